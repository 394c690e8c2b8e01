//! The network against its own invariants; parity with transformers is in `golden`.

use crate::common::{alone, max_difference, tiny_llama, tiny_neox};
use tch::{Device, Kind, Tensor};
use tinyllama::config::AttentionBackend;
use tinyllama::model::mlp::Mlp;
use tinyllama::model::{GPT, KvCache, ModelConfig, init};
use tinyllama::ops::{self, Mask};

fn tokens(vocab: i64, b: i64, t: i64) -> Tensor {
    Tensor::randint(vocab, [b, t], (Kind::Int64, Device::Cpu))
}

#[test]
fn the_two_published_parameter_counts_are_exact() {
    let count = |name| ModelConfig::preset(name).unwrap().n_params();
    assert_eq!(count("tiny-llama-1.1b"), 1_100_048_384);
    assert_eq!(count("tiny-llama-120m"), 121_129_728);
}

#[test]
fn a_model_holds_as_many_parameters_as_its_configuration_counts() {
    for config in [
        tiny_llama(),
        tiny_neox(),
        ModelConfig { tie_embeddings: true, ..tiny_llama() },
        ModelConfig { bias: true, attn_bias: true, ..tiny_llama() },
        ModelConfig { n_query_groups: 1, head_size: 16, ..tiny_llama() },
    ] {
        assert_eq!(GPT::empty(&config, Device::Cpu).n_params(), config.n_params(), "{config:?}");
    }
}

#[test]
fn every_preset_is_valid() {
    for name in ModelConfig::preset_names() {
        assert_eq!(ModelConfig::preset(&name).unwrap().validate(), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn initial_weights_have_the_published_deviations() {
    let _alone = alone();
    let config =
        ModelConfig { n_embd: 512, head_size: 128, intermediate_size: 700, ..tiny_llama() };
    tch::manual_seed(1);
    for (name, p) in GPT::new(&config, Device::Cpu).named_parameters() {
        let std = if p.numel() > 1 { p.std(true).double_value(&[]) } else { 0.0 };
        match init::std_of(&name, &config) {
            Some(want) => assert!((std / want - 1.0).abs() < 0.02, "{name}: {std} want {want}"),
            None => assert!(p.equal(&p.ones_like()), "{name} must start at one"),
        }
    }
    let published = ModelConfig::preset("tiny-llama-1.1b").unwrap();
    assert!((init::std_plain(&published) - 0.013975).abs() < 5e-7);
    assert!((init::std_residual(&published) - 0.0010044).abs() < 5e-8);
}

#[test]
fn a_later_token_never_changes_an_earlier_logit() {
    let _alone = alone();
    for config in [tiny_llama(), tiny_neox()] {
        tch::manual_seed(2);
        let model = GPT::new(&config, Device::Cpu);
        let a = tokens(config.vocab_size, 2, 24);
        let b = a.copy();
        b.narrow(1, 16, 8).copy_(&tokens(config.vocab_size, 2, 8));
        let (ya, yb) = (model.forward(&a, None), model.forward(&b, None));
        assert!(max_difference(&ya.narrow(1, 0, 16), &yb.narrow(1, 0, 16)) < 1e-6);
        assert!(max_difference(&ya.narrow(1, 16, 8), &yb.narrow(1, 16, 8)) > 1e-3);
    }
}

#[test]
fn libtorchs_cpu_attention_agrees_with_the_plain_formula_forward_and_backward() {
    let _alone = alone();
    for (heads, groups, t, s) in [(9, 3, 33, 33), (4, 1, 16, 16), (4, 4, 5, 20), (8, 2, 1, 12)] {
        let run = |backend| {
            tch::manual_seed(3);
            let random = |h, len| {
                Tensor::randn([2, h, len, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true)
            };
            let (q, k, v) = (random(heads, t), random(groups, s), random(groups, s));
            let y = ops::attention(&q, &k, &v, Mask::CAUSAL, backend);
            (&y * Tensor::randn_like(&y)).sum(Kind::Float).backward();
            [y.detach(), q.grad(), k.grad(), v.grad()]
        };
        for (got, want) in run(AttentionBackend::Auto).iter().zip(run(AttentionBackend::Math)) {
            let error = max_difference(got, &want);
            assert!(error < 2e-5, "H {heads} G {groups} T {t} S {s}: {error}");
        }
    }
}

#[test]
fn decoding_with_a_cache_gives_the_logits_of_one_full_forward() {
    let _alone = alone();
    for config in [tiny_llama(), tiny_neox()] {
        tch::manual_seed(4);
        let _guard = tch::no_grad_guard();
        let model = GPT::new(&config, Device::Cpu);
        let idx = tokens(config.vocab_size, 2, 20);
        let full = model.forward(&idx, None);
        let mut cache = KvCache::new(&config, 2, 20, Kind::Float, Device::Cpu);
        // A prompt in two pieces, then token by token.
        let mut pieces = vec![(0, 7), (7, 5)];
        pieces.extend((12..20).map(|i| (i, 1)));
        for (start, len) in pieces {
            let logits = model.forward(&idx.narrow(1, start, len), Some(&mut cache));
            assert!(max_difference(&logits, &full.narrow(1, start, len)) < 1e-5);
        }
    }
}

#[test]
fn the_loss_ignores_masked_targets_and_sums_over_the_rest() {
    let _alone = alone();
    tch::manual_seed(5);
    let logits = Tensor::randn([2, 3, 11], (Kind::Float, Device::Cpu));
    let target = Tensor::from_slice(&[1i64, -100, 3, -100, 0, 10]).view([2, 3]);
    let log_p = logits.log_softmax(-1, Kind::Float);
    let picked = [(0, 0, 1), (0, 2, 3), (1, 1, 0), (1, 2, 10)];
    let want: f64 = picked.iter().map(|&(b, t, v)| -log_p.double_value(&[b, t, v])).sum();
    let got = ops::cross_entropy_sum(&logits, &target).double_value(&[]);
    assert!((got - want).abs() < 1e-5, "{got} {want}");
}

#[test]
fn gate_and_up_lie_behind_each_other_as_one_matrix_whatever_becomes_of_the_model() {
    let _alone = alone();
    let joined = |model: &GPT| {
        model.h.iter().all(|block| match &block.mlp {
            Mlp::LLaMA(mlp) => {
                let (gate, up) = (&mlp.fc_1.weight, &mlp.fc_2.weight);
                let bytes = gate.numel() * gate.kind().elt_size_in_bytes();
                up.data_ptr() as usize == gate.data_ptr() as usize + bytes
            }
            Mlp::GptNeox(_) => false,
        })
    };
    // W2 would start at byte 35 x 12 x 2 = 840, no multiple of 16.
    let odd =
        ModelConfig { n_embd: 12, n_head: 2, n_query_groups: 1, head_size: 6, ..tiny_llama() };
    assert!(!joined(&GPT::new(&ModelConfig { intermediate_size: 35, ..odd }, Device::Cpu)));

    tch::manual_seed(6);
    let mut model = GPT::new(&tiny_llama(), Device::Cpu);
    assert!(joined(&model), "after GPT::new");
    let idx = tokens(tiny_llama().vocab_size, 1, 8);
    let before = model.forward(&idx, None);
    let gate = match &model.h[0].mlp {
        Mlp::LLaMA(mlp) => mlp.fc_1.weight.copy(),
        Mlp::GptNeox(_) => unreachable!("a Llama"),
    };
    model.to_kind(Kind::BFloat16);
    assert!(joined(&model), "after to_kind");
    let Mlp::LLaMA(mlp) = &model.h[0].mlp else { unreachable!("a Llama") };
    assert!(mlp.fc_1.weight.equal(&gate.to_kind(Kind::BFloat16)));
    let after = model.forward(&idx, None).to_kind(Kind::Float);
    assert!(max_difference(&before, &after) < 2e-2);
    // Writing one does not touch the other.
    let up = mlp.fc_2.weight.copy();
    let _ = tch::no_grad(|| mlp.fc_1.weight.shallow_clone().zero_());
    assert!(mlp.fc_2.weight.equal(&up));
}
