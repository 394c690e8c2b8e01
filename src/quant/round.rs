//! Values to 4 bits: the scale and the minimum of a group with the least squared error.

/// Largest code.
const LEVELS: f32 = 15.0;

/// Scale and minimum of `x ~ scale q + min`, q from 0 to 15.
///
/// Candidates cover the range, and somewhat less of it, since rare large values cost all others their precision; for the
/// codes of each, scale and minimum are those of least squares. Constant groups have scale 0.
pub fn best(values: &[f32]) -> (f32, f32) {
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if high <= low {
        return (0.0, low);
    }
    let mut best = (low, 0.0, f32::INFINITY);
    for step in 0..8 {
        let cut = 0.03 * step as f32 * (high - low);
        for (low, high) in
            [(low + cut / 2.0, high - cut / 2.0), (low, high - cut), (low + cut, high)]
        {
            let (scale, min) = fit(values, (high - low) / LEVELS, low);
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
    if scale == 0.0 {
        return 0;
    }
    ((x - min) / scale).round().clamp(0.0, LEVELS) as u8
}

/// Least squares of x over the codes that (scale, min) give.
fn fit(values: &[f32], scale: f32, min: f32) -> (f32, f32) {
    let n = values.len() as f32;
    let (mut q_sum, mut qq, mut x_sum, mut qx) = (0.0, 0.0, 0.0, 0.0);
    for &x in values {
        let q = code(x, scale, min) as f32;
        q_sum += q;
        qq += q * q;
        x_sum += x;
        qx += q * x;
    }
    let spread = n * qq - q_sum * q_sum;
    if spread <= 0.0 {
        return (scale, min);
    }
    let slope = (n * qx - q_sum * x_sum) / spread;
    (slope, (x_sum - slope * q_sum) / n)
}

fn error(values: &[f32], scale: f32, min: f32) -> f32 {
    let of = |&x: &f32| {
        let e = scale * code(x, scale, min) as f32 + min - x;
        e * e
    };
    values.iter().map(of).sum()
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
