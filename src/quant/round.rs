//! Values to 4 bits: the scale and the minimum of a group with the least squared error.

/// Largest code.
const LEVELS: f32 = 15.0;

/// Values that are worked on at a time: they fill vectors.
const LANES: usize = 8;

/// Scale and minimum of `x ~ scale q + min`, q from 0 to 15.
///
/// Candidates cover the range, and somewhat less of it, since rare large values cost all others their precision; for the
/// codes of each, scale and minimum are those of least squares. Constant groups have scale 0.
///
/// # Panics
/// Where their number is no multiple of 8.
pub fn best(values: &[f32]) -> (f32, f32) {
    assert!(values.len().is_multiple_of(LANES), "{} values", values.len());
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if high <= low {
        return (0.0, low);
    }
    let x_sum = values.iter().sum();
    let mut best = (low, 0.0, f32::INFINITY);
    for step in 0..8 {
        let cut = 0.03 * step as f32 * (high - low);
        for (low, high) in
            [(low + cut / 2.0, high - cut / 2.0), (low, high - cut), (low + cut, high)]
        {
            let (scale, min) = fit(values, x_sum, (high - low) / LEVELS, low);
            let error = error(values, scale, min);
            if error < best.2 {
                best = (min, scale, error);
            }
        }
    }
    (best.1, best.0)
}

/// The code of x.
pub fn code(x: f32, scale: f32, min: f32) -> u8 {
    level(x, inverse(scale), min) as u8
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The code as a number, to the nearest even one between two.
fn level(x: f32, inverse: f32, min: f32) -> f32 {
    const WHOLE: f32 = 12_582_912.0; // 1.5 * 2^23: numbers of this size have no fraction
    (((x - min) * inverse).clamp(0.0, LEVELS) + WHOLE) - WHOLE
}

/// Least squares of x over the codes that (scale, min) give.
fn fit(values: &[f32], x_sum: f32, scale: f32, min: f32) -> (f32, f32) {
    let (n, inverse) = (values.len() as f32, inverse(scale));
    let (mut q_sums, mut qqs, mut qxs) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for x in values.chunks_exact(LANES) {
        for i in 0..LANES {
            let q = level(x[i], inverse, min);
            q_sums[i] += q;
            qqs[i] += q * q;
            qxs[i] += q * x[i];
        }
    }
    let sum = |lanes: [f32; LANES]| lanes.iter().sum::<f32>();
    let (q_sum, qq, qx) = (sum(q_sums), sum(qqs), sum(qxs));
    let spread = n * qq - q_sum * q_sum;
    if spread <= 0.0 {
        return (scale, min);
    }
    let slope = (n * qx - q_sum * x_sum) / spread;
    (slope, (x_sum - slope * q_sum) / n)
}

fn error(values: &[f32], scale: f32, min: f32) -> f32 {
    let inverse = inverse(scale);
    let mut sums = [0.0; LANES];
    for x in values.chunks_exact(LANES) {
        for i in 0..LANES {
            let e = scale * level(x[i], inverse, min) + min - x[i];
            sums[i] += e * e;
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_on_a_grid_come_back() {
        let values: Vec<f32> = (0..64).map(|i| -0.3 + 0.04 * (i * 7 % 16) as f32).collect();
        let (scale, min) = best(&values);
        assert!((scale - 0.04).abs() < 1e-6 && (min + 0.3).abs() < 1e-6, "{scale} {min}");
    }

    #[test]
    fn the_search_is_never_worse_than_the_whole_range() {
        for seed in 1..50 {
            let values: Vec<f32> =
                (0..64).map(|i| ((i * i * seed + 7 * i) % 101) as f32 / 50.0 - 0.7).collect();
            let low = values.iter().copied().fold(f32::INFINITY, f32::min);
            let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (scale, min) = best(&values);
            let whole = error(&values, (high - low) / LEVELS, low);
            assert!(error(&values, scale, min) < whole, "seed {seed}");
        }
    }

    #[test]
    fn a_constant_group_is_exact() {
        let (scale, min) = best(&[0.25; 32]);
        assert_eq!((scale, min, code(0.25, scale, min)), (0.0, 0.25, 0));
    }
}
