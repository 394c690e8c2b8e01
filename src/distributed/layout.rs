//! How the parameters of a unit lie in one flat buffer, and which part of it each rank keeps.
//!
//! ```text
//! | p0 .... pad | p1 ........ pad | p2 .. pad | padding |    flat, R equal shards
//! |    shard 0       |     shard 1      |    shard 2    |
//! ```
//!
//! Parameters begin at multiples of 256 values, which is a block of the 8-bit optimizer state, and so do shards: a
//! parameter is cut between such blocks only. Source: FSDP's flat parameters (arXiv 2304.11277), `fully_shard` of
//! torchtitan.

/// Parameters and shards begin at multiples of so many values.
pub const ALIGN: i64 = 256;

/// One parameter's place.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// lit-gpt name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// Its first value in the flat buffer.
    pub start: i64,
}

impl Place {
    /// Values.
    pub fn numel(&self) -> i64 {
        self.shape.iter().product()
    }
}

/// The flat buffer of a unit over `ranks` shards.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// Parameters, in the model's order.
    pub places: Vec<Place>,
    /// Values of the buffer, a multiple of `ranks * ALIGN`.
    pub len: i64,
    /// Values of a shard.
    pub shard: i64,
}

/// The part of a parameter that lies in a shard.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slice {
    /// Which of the layout's places.
    pub place: usize,
    /// Its first value, counted in the parameter.
    pub in_parameter: i64,
    /// The same value, counted in the shard.
    pub in_shard: i64,
    /// Values.
    pub len: i64,
}

impl Layout {
    /// Places for parameters of these names and shapes.
    pub fn new(parameters: impl IntoIterator<Item = (String, Vec<i64>)>, ranks: i64) -> Self {
        let mut end = 0;
        let place = |(name, shape): (String, Vec<i64>)| {
            let start = end;
            let numel: i64 = shape.iter().product();
            end = next_multiple(start + numel, ALIGN);
            Place { name, shape, start }
        };
        let places = parameters.into_iter().map(place).collect();
        let len = next_multiple(end, ranks * ALIGN);
        Self { places, len, shard: len / ranks }
    }

    /// What a rank's shard holds, in order.
    pub fn slices(&self, rank: i64) -> Vec<Slice> {
        let (from, to) = (rank * self.shard, (rank + 1) * self.shard);
        let slice = |(i, place): (usize, &Place)| {
            let first = place.start.max(from);
            let len = (place.start + place.numel()).min(to) - first;
            let (in_parameter, in_shard) = (first - place.start, first - from);
            (len > 0).then_some(Slice { place: i, in_parameter, in_shard, len })
        };
        self.places.iter().enumerate().filter_map(slice).collect()
    }
}

fn next_multiple(n: i64, of: i64) -> i64 {
    (n + of - 1) / of * of
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(sizes: &[i64], ranks: i64) -> Layout {
        let named = |(i, &n): (usize, &i64)| (format!("p{i}"), vec![n]);
        Layout::new(sizes.iter().enumerate().map(named), ranks)
    }

    proptest! {
        #[test]
        fn shards_cover_every_value_of_every_parameter_once(
            sizes in prop::collection::vec(1i64..3000, 1..8),
            ranks in 1i64..9,
        ) {
            let layout = layout(&sizes, ranks);
            prop_assert_eq!(layout.len, layout.shard * ranks);
            let mut seen: Vec<Vec<u8>> = sizes.iter().map(|&n| vec![0; n as usize]).collect();
            for rank in 0..ranks {
                for s in layout.slices(rank) {
                    prop_assert_eq!(s.in_parameter % ALIGN, 0);
                    prop_assert_eq!(s.in_shard % ALIGN, 0);
                    let start = layout.places[s.place].start;
                    prop_assert_eq!(start + s.in_parameter, rank * layout.shard + s.in_shard);
                    for i in s.in_parameter..s.in_parameter + s.len {
                        seen[s.place][i as usize] += 1;
                    }
                }
            }
            prop_assert!(seen.iter().flatten().all(|&n| n == 1));
        }
    }

    #[test]
    fn neighbours_whose_sizes_are_multiples_of_the_alignment_lie_side_by_side() {
        let layout = layout(&[512, 256, 100, 5], 4);
        let starts: Vec<i64> = layout.places.iter().map(|p| p.start).collect();
        assert_eq!(starts, [0, 512, 768, 1024]);
        assert_eq!((layout.len, layout.shard), (2048, 512));
        assert_eq!(layout.slices(3), []); // padding alone
    }
}
