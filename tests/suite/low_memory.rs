//! AdamW with weights and moments in fewer bytes: exactness, unbiased rounding, resume, and learning.

use crate::common::{alone, one_step, tiny_llama};
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::Moments;
use tinyllama::config::{MasterFormat, OptimizerConfig, Precision, StateFormat};
use tinyllama::data::Batch;
use tinyllama::model::GPT;
use tinyllama::train::optimizer::AdamW;
use tinyllama::train::optimizer::low_memory::{self, Noise, noise_key};

const MASTERS: [MasterFormat; 3] = [MasterFormat::Fp32, MasterFormat::Split, MasterFormat::Bf16];
const STATES: [StateFormat; 3] = [StateFormat::Fp32, StateFormat::Bf16, StateFormat::Int8];

fn formats() -> impl Iterator<Item = OptimizerConfig> {
    let both = |master| STATES.map(|state| OptimizerConfig { master, state, ..Default::default() });
    MASTERS.into_iter().flat_map(both)
}

fn name(config: &OptimizerConfig) -> String {
    format!("master {}, state {}", config.master, config.state)
}

fn bits(x: &Tensor) -> Tensor {
    x.view_dtype(Kind::Int)
}

fn floats(bits: &[i32]) -> Tensor {
    Tensor::from_slice(bits).view_dtype(Kind::Float)
}

/// A value as bf16, as fp32.
fn widen(x: &Tensor) -> Tensor {
    x.to_kind(Kind::Float)
}

// ---- split ---------------------------------------------------------------------------------------------------

#[test]
fn split_gives_back_every_low_half_of_zeros_denormals_and_normals_of_both_signs() {
    let low = Tensor::arange(0x10000, (Kind::Int64, Device::Cpu));
    // Zero, denormals, the first normal, an exponent's end, 1, odd and even, the largest finite.
    let highs =
        [0, 1, 2, 0x7e, 0x7f, 0x80, 0x81, 0x3f7f, 0x3f80, 0x3f81, 0x4049, 0x7f00, 0x7f7e, 0x7f7f];
    for high in highs.into_iter().flat_map(|high: i64| [high, high | 0x8000]) {
        let x = (&low + (high << 16)).to_kind(Kind::Int).view_dtype(Kind::Float);
        let (weight, kept) = low_memory::split(&x);
        assert_eq!((weight.kind(), kept.kind()), (Kind::BFloat16, Kind::Int16));
        assert!(bits(&low_memory::join(&weight, &kept)).equal(&bits(&x)), "high half {high:#x}");
        // The weight is libtorch's rounding but for the one tie of an even high half, where it goes up.
        let same = weight
            .view_dtype(Kind::Int16)
            .eq_tensor(&x.to_kind(Kind::BFloat16).view_dtype(Kind::Int16));
        let different = same.logical_not().nonzero().view([-1]);
        let want: &[i64] = if high % 2 == 0 { &[0x8000] } else { &[] };
        assert_eq!(Vec::<i64>::try_from(different).unwrap(), want, "high half {high:#x}");
        assert!(weight.equal(&low_memory::nearest_bf16(&x)));
    }
}

#[test]
fn infinities_and_nans_stay_what_they_are_in_bf16() {
    let inf = floats(&[0x7f80_0000, 0xff80_0000u32 as i32]);
    // Quiet, with every bit set as the GPU makes it, and one whose high half alone looks infinite; both signs.
    let nan = [0x7fc0_0000u32, 0x7fff_ffff, 0x7f80_0001, 0xffff_ffff, 0xff80_0001];
    let nan = floats(&nan.map(|x| x as i32));
    for noise in [0, 0x8000, 0xffff] {
        let round = |x: &Tensor| {
            low_memory::stochastic_bf16(x, &Tensor::full(x.size(), noise, (Kind::Int, Device::Cpu)))
        };
        assert!(bool::try_from(round(&nan).isnan().all()).unwrap());
        assert!(widen(&round(&inf)).equal(&inf));
    }
    assert!(widen(&low_memory::nearest_bf16(&inf)).equal(&inf));
    let (weight, low) = low_memory::split(&nan);
    assert!(bool::try_from(low_memory::join(&weight, &low).isnan().all()).unwrap());
}

// ---- stochastic rounding -------------------------------------------------------------------------------------

#[test]
fn the_random_bits_are_uniform_and_independent_of_place_step_and_use() {
    let n = 1 << 20;
    let draw = |step| Noise::new(noise_key(42, step, 3), &[n], Device::Cpu);
    let (one, two) = (draw(1), draw(2));
    let centred = |x: &Tensor| x.to_kind(Kind::Double) / 65_536.0 + (0.5 / 65_536.0 - 0.5);
    let streams = [&one.weight, &one.exp_avg, &one.exp_avg_sq, &two.weight, &two.exp_avg];
    for (i, a) in streams.iter().enumerate() {
        let (least, most) = (a.min().int64_value(&[]), a.max().int64_value(&[]));
        assert!(least >= 0 && most < 65_536 && most - least > 65_000, "{i}: {least} .. {most}");
        let counts = (*a / 256).to_kind(Kind::Int64).bincount::<Tensor>(None, 256);
        let expected = n as f64 / 256.0;
        let chi2 =
            ((counts.to_kind(Kind::Double) - expected).square() / expected).sum(Kind::Double);
        // 255 degrees of freedom: 255 +- 23.
        assert!((150.0..370.0).contains(&chi2.double_value(&[])), "{i}: chi2 {chi2:?}");
        // Correlations of 2^20 draws: 0 +- 0.001.
        let correlation = |x: &Tensor, y: &Tensor| {
            (centred(x) * centred(y)).mean(Kind::Double).double_value(&[]) * 12.0
        };
        let neighbours = correlation(&a.narrow(0, 0, n - 1), &a.narrow(0, 1, n - 1));
        assert!(neighbours.abs() < 5e-3, "{i}: {neighbours}");
        for b in &streams[..i] {
            assert!(correlation(a, b).abs() < 5e-3, "{i}");
        }
    }
}

#[test]
fn stochastic_rounding_to_bf16_draws_a_neighbour_and_is_right_on_average() {
    let n = 1 << 18;
    for value in [1.0 + 1.0 / 1024.0, -2.7654321, 1e-30, 6.5e-39, 0.7, 0.0] {
        let x = Tensor::full([n], value, (Kind::Float, Device::Cpu));
        let noise = Noise::new(noise_key(1, 2, 3), &[n], Device::Cpu).weight;
        let got = low_memory::stochastic_bf16(&x, &noise);
        assert!(got.equal(&low_memory::stochastic_bf16(&x, &noise)));
        let got = got.to_kind(Kind::Double);
        let exact = x.to_kind(Kind::Double).double_value(&[0]);
        let (least, most) = (got.min().double_value(&[]), got.max().double_value(&[]));
        let gap = most - least;
        assert!(least <= exact && exact <= most && gap <= exact.abs() / 128.0 + 1e-40);
        // The mean of n draws of a coin on a gap: within 5 deviations.
        let mean = got.mean(Kind::Double).double_value(&[]);
        assert!((mean - exact).abs() <= gap * 5.0 * 0.5 / (n as f64).sqrt(), "{value}: {mean}");
    }
    let exact = Tensor::from_slice(&[1.0f32, -0.5, 0.0, 3.0]);
    let most = Tensor::full([4], 0xffff, (Kind::Int, Device::Cpu));
    assert!(widen(&low_memory::stochastic_bf16(&exact, &most)).equal(&exact));
}

#[test]
fn a_change_far_below_the_spacing_moves_bf16_on_average_and_not_at_all_if_rounded_to_nearest() {
    let n = 4096;
    let start = Tensor::ones([n], (Kind::Float, Device::Cpu));
    let (mut random, mut nearest) = (start.to_kind(Kind::BFloat16), start.to_kind(Kind::BFloat16));
    for step in 0..500 {
        let noise = Noise::new(noise_key(7, step, 0), &[n], Device::Cpu);
        random = low_memory::stochastic_bf16(&(widen(&random) * 0.999), &noise.exp_avg_sq);
        nearest = low_memory::nearest_bf16(&(widen(&nearest) * 0.999));
    }
    let mean = widen(&random).mean(Kind::Double).double_value(&[]);
    let want = 0.999f64.powi(500);
    assert!((mean / want - 1.0).abs() < 5e-3, "{mean}, want {want}");
    assert!(widen(&nearest).equal(&start));
}

// ---- 8 bits --------------------------------------------------------------------------------------------------

/// Values over many magnitudes in blocks of very different scale; 1,000 is no multiple of 256.
fn spread() -> Tensor {
    tch::manual_seed(11);
    let x = Tensor::randn([1000], (Kind::Float, Device::Cpu));
    let magnitude = (Tensor::randn([1000], (Kind::Float, Device::Cpu)) * 2.0).exp();
    let scale =
        Tensor::from_slice(&[1e-12f32, 1.0, 1e8, 1e-3]).repeat_interleave_self_int(256, 0, None);
    x * magnitude * scale.narrow(0, 0, 1000)
}

/// The scale of each element.
fn per_element(scale: &Tensor, n: i64) -> Tensor {
    scale.repeat_interleave_self_int(256, 0, None).narrow(0, 0, n).to_kind(Kind::Double)
}

#[test]
fn eight_bits_come_back_within_the_spacing_of_the_codes_and_the_largest_exactly() {
    let _alone = alone();
    let x = spread();
    let x = x.view([4, 250]); // blocks run over rows
    let noise = Noise::new(noise_key(5, 1, 0), &x.size(), Device::Cpu);
    let v = x.square();
    let (code, scale) = low_memory::quantize_signed(&x, &noise.exp_avg);
    let (code_v, scale_v) = low_memory::quantize_unsigned(&v, &noise.exp_avg_sq);
    assert_eq!((code.kind(), code_v.kind()), (Kind::Int8, Kind::Uint8));
    assert_eq!((code.size(), scale.size()), (vec![4, 250], vec![4]));
    let back = low_memory::dequantize_signed(&code, &scale);
    let back_v = low_memory::dequantize_unsigned(&code_v, &scale_v);
    for (x, back, scale, power, top) in
        [(&x, &back, &scale, 2.0, 127.0), (&v, &back_v, &scale_v, 4.0, 255.0)]
    {
        let (x, back) = (x.view([-1]).to_kind(Kind::Double), back.view([-1]).to_kind(Kind::Double));
        let s = per_element(scale, 1000);
        // Codes whose power stands for a value lie one apart.
        let place = |x: &Tensor| (x.abs() / &s).pow_tensor_scalar(1.0 / power) * top;
        let moved = (place(&x) - place(&back)).abs().max().double_value(&[]);
        assert!(moved < 1.0 + 1e-3, "{moved}");
        let largest = x.abs().ge_tensor(&(&s * (1.0 - 1e-9)));
        let error = ((&x - &back).abs() / &s).masked_select(&largest).max().double_value(&[]);
        assert!(error < 1e-6, "{error}");
        assert!(bool::try_from((&x * &back).ge(0.0).all()).unwrap(), "signs");
    }
    assert!(bool::try_from(code_v.gt(0).all()).unwrap(), "no second moment becomes 0");
}

#[test]
fn eight_bits_are_right_on_average() {
    let _alone = alone();
    let x = spread().narrow(0, 256, 256);
    let v = x.square();
    let draws = 1024;
    let zeros = || Tensor::zeros([256], (Kind::Double, Device::Cpu));
    let (mut sum, mut sum_v, mut sum_v2) = (zeros(), zeros(), zeros());
    for step in 0..draws {
        let noise = Noise::new(noise_key(9, step, 0), &[256], Device::Cpu);
        let (code, scale) = low_memory::quantize_signed(&x, &noise.exp_avg);
        sum += low_memory::dequantize_signed(&code, &scale).to_kind(Kind::Double);
        let (code, scale) = low_memory::quantize_unsigned(&v, &noise.exp_avg_sq);
        let back = low_memory::dequantize_unsigned(&code, &scale).to_kind(Kind::Double);
        sum_v2 += back.square();
        sum_v += back;
    }
    let scale = x.abs().max().double_value(&[]);
    let error = (sum / draws as f64 - x.to_kind(Kind::Double)).abs();
    // One draw is off by at most a gap, 2 sqrt(|x| s) / 127 + s / 127^2.
    let gap = (x.abs().to_kind(Kind::Double) * scale).sqrt() * (2.0 / 127.0) + scale / 16_129.0;
    let worst = (error / gap).max().double_value(&[]) * (draws as f64).sqrt();
    assert!(worst < 2.5, "{worst} times gap / sqrt(draws)"); // 5 deviations of at most half a gap
    let (mean, v) = (sum_v / draws as f64, v.to_kind(Kind::Double));
    let deviation =
        (sum_v2 / draws as f64 - mean.square()).clamp_min(0.0).sqrt() / (draws as f64).sqrt();
    let smallest = v.max().double_value(&[]) / 255f64.powi(4);
    let inside = v.gt(smallest).to_kind(Kind::Double); // below it they are rounded up
    let worst = ((mean - &v).abs() * inside / (deviation + &v * 1e-5)).max().double_value(&[]);
    assert!(worst < 5.0, "{worst} deviations");
}

#[test]
fn blocks_of_zeros_and_of_tiny_values_stay_finite() {
    let x = Tensor::cat(
        &[
            Tensor::zeros([256], (Kind::Float, Device::Cpu)),
            Tensor::full([256], 1e-38, (Kind::Float, Device::Cpu)),
            Tensor::full([3], 1e38, (Kind::Float, Device::Cpu)),
        ],
        0,
    );
    let noise = Noise::half(&[515], Device::Cpu);
    let (code, scale) = low_memory::quantize_signed(&x, &noise.exp_avg);
    let back = low_memory::dequantize_signed(&code, &scale);
    let (code, scale) = low_memory::quantize_unsigned(&x, &noise.exp_avg_sq);
    let back_v = low_memory::dequantize_unsigned(&code, &scale);
    for back in [back, back_v] {
        assert!((&back - &x).abs().narrow(0, 0, 512).max().double_value(&[]) <= 1e-37);
        let large = back.double_value(&[514]);
        assert!((large / 1e38 - 1.0).abs() < 1e-6, "{large}");
    }
}

// ---- training ------------------------------------------------------------------------------------------------

fn fresh(config: &OptimizerConfig) -> (GPT, AdamW) {
    tch::manual_seed(1);
    let mut model = GPT::new(&tiny_llama(), Device::Cpu);
    let mut optimizer = AdamW::new(&mut model, Precision::Bf16Mixed, config).unwrap();
    optimizer.seed = 17;
    (model, optimizer)
}

fn batch(seed: i64) -> Batch {
    tch::manual_seed(seed);
    let tokens = Tensor::randint(97, [2, 17], (Kind::Int64, Device::Cpu));
    let (input, target) = (tokens.narrow(1, 0, 16), tokens.narrow(1, 1, 16));
    Batch { input, target, documents: None, n_targets: 32 }
}

/// Losses of steps on batches of these seeds.
fn train(
    model: &GPT,
    optimizer: &mut AdamW,
    seeds: impl Iterator<Item = i64>,
    lr: f64,
) -> Vec<f64> {
    let step = |seed| {
        let data = [batch(seed)];
        let out = one_step(model, optimizer, &data, lr);
        optimizer.zero_grad();
        out.loss.double_value(&[])
    };
    seeds.map(step).collect()
}

fn copies(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    tensors.into_iter().map(|(name, t)| (name, t.copy())).collect()
}

fn assert_equal(got: &[(String, Tensor)], want: &[(String, Tensor)], what: &str) {
    assert_eq!(got.len(), want.len());
    for ((name, a), (_, b)) in got.iter().zip(want) {
        assert!(a.kind() == b.kind() && a.equal(b), "{what}: {name} differs");
    }
}

#[test]
fn a_split_master_trains_bit_for_bit_as_an_fp32_master() {
    let _alone = alone();
    for state in STATES {
        let run = |master| {
            let config = OptimizerConfig { master, state, ..Default::default() };
            let (model, mut optimizer) = fresh(&config);
            let losses = train(&model, &mut optimizer, 0..60, 3e-3);
            (losses, optimizer.masters(), optimizer.state(), model.named_parameters())
        };
        let (losses, masters, moments, weights) = run(MasterFormat::Fp32);
        let (split_losses, split_masters, split_moments, split_weights) = run(MasterFormat::Split);
        assert_eq!(losses, split_losses);
        assert_equal(&split_masters, &masters, "master");
        assert_equal(&split_moments, &moments, "moment");
        assert_equal(&split_weights, &weights, "weight");
    }
}

#[test]
fn every_format_learns_as_fp32_does() {
    let _alone = alone();
    let run = |config: &OptimizerConfig| {
        let (model, mut optimizer) = fresh(config);
        train(&model, &mut optimizer, (0..200).map(|i| i % 4), 2e-3)
    };
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let exact = run(&OptimizerConfig::default());
    // A split master has the fp32 one's losses.
    for config in formats().filter(|config| config.master != MasterFormat::Split) {
        let losses = run(&config);
        // On the way down, where it is steep, and at the end.
        for range in [40..60, 100..120, 180..200] {
            let (got, want) = (mean(&losses[range.clone()]), mean(&exact[range.clone()]));
            let allowed = 0.05 * want + 0.02;
            assert!(
                (got - want).abs() < allowed,
                "{}, {range:?}: {got}, fp32 {want}",
                name(&config)
            );
        }
    }
}

#[test]
fn a_resumed_run_equals_one_that_was_not_interrupted_in_every_format() {
    let _alone = alone();
    for config in formats() {
        let (model, mut straight) = fresh(&config);
        train(&model, &mut straight, 0..4, 1e-3);
        let (weights, moments) = (copies(straight.masters()), copies(straight.state()));
        let losses = train(&model, &mut straight, 4..8, 1e-3);

        tch::manual_seed(99); // other weights, all replaced
        let mut model = GPT::new(&tiny_llama(), Device::Cpu);
        for ((_, mut to), (_, from)) in model.named_parameters().into_iter().zip(&weights) {
            tch::no_grad(|| to.copy_(from));
        }
        let mut resumed = AdamW::new(&mut model, Precision::Bf16Mixed, &config).unwrap();
        resumed.seed = 17;
        resumed.load_state(4, &Moments::of(&moments)).unwrap();
        assert_eq!(train(&model, &mut resumed, 4..8, 1e-3), losses, "{}", name(&config));
        assert_equal(&resumed.masters(), &straight.masters(), &name(&config));
        assert_equal(&resumed.state(), &straight.state(), &name(&config));
    }
}

#[test]
fn moments_of_another_format_are_refused_by_name_and_fp32_ones_are_taken_over() {
    let _alone = alone();
    let with = |state| OptimizerConfig { state, ..Default::default() };
    for from in STATES {
        let (model, mut optimizer) = fresh(&with(from));
        train(&model, &mut optimizer, 0..2, 1e-3);
        let saved = copies(optimizer.state());
        for to in STATES.into_iter().filter(|to| *to != from) {
            let (_, mut other) = fresh(&with(to));
            let loaded = other.load_state(2, &Moments::of(&saved));
            if from == StateFormat::Fp32 {
                loaded.unwrap();
                let near = |p: &tinyllama::train::optimizer::ParamState| match &p.scales {
                    Some([scale, _]) => low_memory::dequantize_signed(&p.exp_avg, scale),
                    None => widen(&p.exp_avg),
                };
                for (p, q) in other.params.iter().zip(&optimizer.params) {
                    let error = (near(p) - &q.exp_avg).norm() / q.exp_avg.norm();
                    assert!(error.double_value(&[]) < 0.02, "{}: {error:?}", p.name);
                }
                continue;
            }
            let error = loaded.unwrap_err().to_string();
            let both = [format!("`{from}`"), format!("`{to}`")];
            assert!(both.iter().all(|text| error.contains(text)), "{error}");
        }
    }
}

#[test]
fn a_gradient_that_is_not_finite_leaves_every_format_untouched() {
    let _alone = alone();
    for config in formats() {
        let (model, mut optimizer) = fresh(&config);
        train(&model, &mut optimizer, 0..2, 1e-3);
        let (masters, moments) = (copies(optimizer.masters()), copies(optimizer.state()));
        for p in &mut optimizer.params {
            p.grad = Tensor::ones_like(&p.exact()).to_kind(Kind::Float);
        }
        let _ = optimizer.params[1].grad.view([-1]).narrow(0, 0, 1).fill_(f64::INFINITY);
        let norm = optimizer.step(1e-3, Some(1.0)).unwrap();
        assert!(!norm.double_value(&[]).is_finite());
        assert_equal(&optimizer.masters(), &masters, &name(&config));
        assert_equal(&optimizer.state(), &moments, &name(&config));
    }
}
