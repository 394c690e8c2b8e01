//! Checkpoint folders: bit-exact, atomic, found by integer step, refused with reasons.

use crate::common::{max_difference, tiny_llama, tiny_neox};
use std::fs;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tinyllama::checkpoint::{self, TrainState};
use tinyllama::model::{GPT, ModelConfig, RopeScaling, RopeType};

fn random(config: &ModelConfig) -> GPT {
    tch::manual_seed(11);
    let model = GPT::new(config, Device::Cpu);
    tch::no_grad(|| {
        for (_, mut p) in model.named_parameters() {
            let _ = p.normal_(0.1, 1.0);
        }
    });
    model
}

/// Configurations as `config.json` can say them: one vocabulary.
fn configs() -> Vec<ModelConfig> {
    let one_vocab = |c: ModelConfig| ModelConfig { vocab_size: c.padded_vocab_size, ..c };
    [
        tiny_llama(),
        ModelConfig { n_query_groups: 1, ..tiny_llama() },
        ModelConfig { tie_embeddings: true, ..tiny_llama() },
        ModelConfig { bias: true, attn_bias: true, ..tiny_llama() },
        ModelConfig { rope_scaling: Some(RopeScaling::new(RopeType::Linear, 4.0)), ..tiny_llama() },
        tiny_neox(),
    ]
    .map(one_vocab)
    .into()
}

#[test]
fn a_model_survives_a_round_trip_bit_for_bit_whole_and_in_shards() {
    for config in configs() {
        let model = random(&config);
        for shard in [usize::MAX, 6000] {
            let dir = tempfile::tempdir().unwrap();
            checkpoint::save(dir.path(), &model).unwrap();
            if shard != usize::MAX {
                fs::remove_file(dir.path().join("model.safetensors")).unwrap();
                let parameters = model.named_parameters();
                checkpoint::save_weights(dir.path(), &config, &parameters, shard).unwrap();
                assert!(dir.path().join("model.safetensors.index.json").is_file());
            }
            assert_eq!(checkpoint::load_config(dir.path()).unwrap(), config);
            let back = checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu).unwrap();
            for ((name, a), (_, b)) in model.named_parameters().iter().zip(back.named_parameters())
            {
                assert!(a.equal(&b), "{name}");
            }
        }
    }
}

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        iter: 2 * step,
        tokens: 64 * step,
        elapsed_seconds: 0.1 + 0.2,
        world_size: 1,
        seed: u64::MAX,
        precision: "bf16-mixed".into(),
        data: serde_json::json!({"sample": 3}),
    }
}

#[test]
fn the_train_state_survives_a_round_trip_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    tch::manual_seed(1);
    let moments =
        [(Kind::Float, "exp_avg.a"), (Kind::BFloat16, "exp_avg_sq.a")].map(|(kind, name)| {
            (name.to_owned(), Tensor::randn([3, 5], tch::kind::FLOAT_CPU).to_kind(kind))
        });
    let generators = [("cpu".to_owned(), tinyllama::ffi::rng_state(Device::Cpu).unwrap())];
    checkpoint::save_train_state(dir.path(), &state(7), &moments, &generators).unwrap();
    let (s, m, g) = checkpoint::load_train_state(dir.path()).unwrap();
    assert_eq!(s, state(7));
    assert!(m.iter().zip(&moments).all(|(a, b)| a.0 == b.0 && a.1.equal(&b.1)));
    assert!(g[0].1.equal(&generators[0].1));

    // The generator continues as if nothing had happened.
    let next = Tensor::randn([4], tch::kind::FLOAT_CPU);
    tinyllama::ffi::set_rng_state(Device::Cpu, &g[0].1).unwrap();
    assert!(next.equal(&Tensor::randn([4], tch::kind::FLOAT_CPU)));
}

fn fake(out: &Path, name: &str) {
    checkpoint::save_atomically(out, name, |dir| {
        fs::write(dir.join("config.json"), "{}")?;
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_newest_checkpoint_is_the_one_of_the_highest_integer_step() {
    let out = tempfile::tempdir().unwrap();
    for name in ["step-999999", "step-1000000", "step-00000005"] {
        fake(out.path(), name);
    }
    fs::create_dir(out.path().join("step-2000000")).unwrap(); // incomplete: no config.json
    let newest = checkpoint::latest(out.path()).unwrap().unwrap();
    assert!(newest.ends_with("step-1000000"), "{newest:?}");
    checkpoint::prune(out.path(), 1).unwrap();
    assert_eq!(checkpoint::list(out.path()).unwrap().len(), 1);
    assert_eq!(checkpoint::resolve(out.path()).unwrap(), newest);
}

#[test]
fn a_crash_while_saving_leaves_the_previous_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    fake(out.path(), "final");
    // The process dies: its temporary folder stays.
    fs::create_dir(out.path().join(".tmp-step-00000009")).unwrap();
    fs::write(out.path().join(".tmp-step-00000009/config.json"), "{}").unwrap();
    assert!(checkpoint::latest(out.path()).unwrap().is_none()); // `final` without a state has no step
    // The write fails: nothing is left of it.
    let failed = checkpoint::save_atomically(out.path(), "final", |dir| {
        fs::write(dir.join("config.json"), "half")?;
        anyhow::bail!("no more ink")
    });
    assert!(failed.unwrap_err().to_string().contains("no more ink"));
    assert_eq!(fs::read_to_string(out.path().join("final/config.json")).unwrap(), "{}");
    assert!(!out.path().join(".tmp-final").exists());
    assert!(!out.path().join(".tmp-step-00000009").exists(), "swept by the next save");
    // Between the two renames: the old one was moved aside and comes back.
    fs::rename(out.path().join("final"), out.path().join(".tmp-old-final")).unwrap();
    fake(out.path(), "step-00000010");
    assert_eq!(fs::read_to_string(out.path().join("final/config.json")).unwrap(), "{}");
}

#[test]
fn a_full_disk_is_told_with_sizes_and_leaves_the_previous_checkpoint() {
    let out = tempfile::tempdir().unwrap();
    fake(out.path(), "step-00000001");
    let error = checkpoint::check_space(out.path(), 1 << 60).unwrap_err().to_string();
    assert!(error.contains("out of disk") && error.contains("free"), "{error}");
    let failed = checkpoint::save_atomically(out.path(), "step-00000002", |_| {
        Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
    });
    let error = failed.unwrap_err().to_string();
    assert!(error.contains("out of disk while saving"), "{error}");
    assert_eq!(checkpoint::list(out.path()).unwrap().len(), 1);
    assert!(!out.path().join(".tmp-step-00000002").exists());
}

fn load_error(dir: &Path, config: &ModelConfig) -> String {
    let model = GPT::empty(config, Device::Cpu);
    format!("{:#}", checkpoint::load_weights(&model, dir).unwrap_err())
}

#[test]
fn damaged_and_strange_checkpoints_are_refused_with_reasons() {
    let config = configs().remove(0);
    let model = random(&config);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    checkpoint::save(dir.path(), &model).unwrap();

    let other = ModelConfig { n_layer: 3, ..config.clone() };
    let error = load_error(dir.path(), &other);
    assert!(error.contains("another architecture"), "{error}");
    assert!(error.contains("`n_layer`: expected 3, got 2"), "{error}");

    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 10]).unwrap();
    assert!(load_error(dir.path(), &config).contains("is damaged"));
    fs::write(&path, b"").unwrap();
    assert!(load_error(dir.path(), &config).contains("is damaged"));

    // A weights file of another model beside this config.json.
    let wide = random(&ModelConfig { intermediate_size: 56, ..config.clone() });
    checkpoint::save_weights(dir.path(), &config, &wide.named_parameters(), usize::MAX).unwrap();
    let error = load_error(dir.path(), &config);
    assert!(
        error.contains("mlp.gate_proj.weight`: expected shape [48, 32], got [56, 32]"),
        "{error}"
    );

    fs::remove_file(&path).unwrap();
    assert!(load_error(dir.path(), &config).contains("no `model.safetensors` and no index"));
    let missing = checkpoint::resolve(Path::new("/no/such/place")).unwrap_err();
    assert!(missing.to_string().contains("does not exist"));
}

#[test]
fn a_bf16_checkpoint_loads_into_fp32_exactly() {
    let config = configs().remove(0);
    let mut model = random(&config);
    model.to_kind(Kind::BFloat16);
    let dir = tempfile::tempdir().unwrap();
    checkpoint::save(dir.path(), &model).unwrap();
    let back = checkpoint::load_model(dir.path(), Kind::Float, Device::Cpu).unwrap();
    let pairs = model.named_parameters().into_iter().zip(back.named_parameters());
    assert!(pairs.into_iter().all(|((_, a), (_, b))| max_difference(&a, &b) == 0.0));
}
