//! Problems of the key `finetune`.

use crate::checkpoint::adapter;
use crate::config::{
    ActivationCheckpointing, AttentionBackend, DataConfig, DpoConfig, FinetuneConfig, LoraConfig,
    LossOn, Method, Precision, RunConfig, Strategy,
};
use crate::model::{GPT, ModelConfig};

/// What is wrong with a finetuning run; whether files are there shows when they are opened.
pub(super) fn check(
    config: &RunConfig,
    finetune: &FinetuneConfig,
    model: Option<&ModelConfig>,
    problems: &mut Vec<String>,
) {
    let mut add = |problem: &str| problems.push(problem.to_owned());
    let data = &finetune.data;
    if data.train.as_os_str().is_empty() {
        add("`finetune.data.train`: needs a file, a folder or a pattern of conversations");
    }
    if !(0.0..1.0).contains(&data.val_fraction) {
        problems.push(format!(
            "`finetune.data.val_fraction`: must be in [0, 1), got {}",
            data.val_fraction
        ));
    }
    let mut add = |problem: &str| problems.push(problem.to_owned());
    if data.val.is_some() && data.val_fraction > 0.0 {
        add(
            "`finetune.data.val_fraction`: `finetune.data.val` names the validation set already; keep one",
        );
    }
    let DataConfig { epochs, prefetch, .. } = config.data;
    if config.data != (DataConfig { epochs, prefetch, ..DataConfig::default() }) {
        add(
            "`data`: of a finetuning run only `epochs` and `prefetch` count; conversations are under `finetune.data`",
        );
    }
    let LoraConfig { dropout, .. } = finetune.lora; // `dpo` has another default of it
    let plain = LoraConfig { dropout, ..LoraConfig::default() };
    let ignored = [
        ("lora", finetune.method == Method::Full && finetune.lora != plain),
        ("dpo", config.dpo().is_none() && finetune.dpo != DpoConfig::default()),
        ("data.loss_on", config.dpo().is_some() && data.loss_on != LossOn::Assistant),
    ];
    for (key, _) in ignored.into_iter().filter(|(_, is_ignored)| *is_ignored) {
        let method = serde_json::to_value(finetune.method).unwrap_or_default();
        let method = method.as_str().unwrap_or_default().to_owned();
        add(&format!(
            "`finetune.{key}`: does nothing with `finetune.method: {method}`; leave it out, or set another method"
        ));
    }
    if data.packing && config.dpo().is_none() && config.attention == AttentionBackend::Cudnn {
        add(
            "`attention`: cuDNN's knows no documents; with `finetune.data.packing` say `auto` or `flash`",
        );
    }
    if config.lora().is_some() && config.distributed.strategy != Strategy::Ddp {
        add("`distributed.strategy`: adapters take `ddp`");
    }
    if config.lora().is_some() {
        check_lora(config, finetune, model, problems);
    }
    if let Some(dpo) = config.dpo() {
        check_dpo(config, dpo, problems);
    }
}

fn check_dpo(config: &RunConfig, dpo: &DpoConfig, problems: &mut Vec<String>) {
    let mut add = |problem: String| problems.push(problem);
    if !(dpo.beta > 0.0 && dpo.beta.is_finite()) {
        add(format!("`finetune.dpo.beta`: must be above 0, got {}", dpo.beta));
    }
    if config.precision == Precision::Fp8Mixed {
        add("`precision`: `finetune.method: dpo` takes bf16-mixed, bf16-true or 32-true".into());
    }
    if config.train.label_smoothing > 0.0 || config.train.z_loss > 0.0 {
        add("`train.label_smoothing`, `train.z_loss`: `finetune.method: dpo` has a loss of its own; set them to 0".into());
    }
}

fn check_lora(
    config: &RunConfig,
    finetune: &FinetuneConfig,
    model: Option<&ModelConfig>,
    problems: &mut Vec<String>,
) {
    let lora = &finetune.lora;
    let mut add = |problem: String| problems.push(problem);
    if lora.r < 1 {
        add(format!("`finetune.lora.r`: must be at least 1, got {}", lora.r));
    }
    if !(lora.alpha > 0.0 && lora.alpha.is_finite()) {
        add(format!("`finetune.lora.alpha`: must be above 0, got {}", lora.alpha));
    }
    if !(0.0..1.0).contains(&lora.dropout) {
        add(format!("`finetune.lora.dropout`: must be in [0, 1), got {}", lora.dropout));
    }
    match adapter::targets(&lora.targets) {
        Err(e) => add(format!("`finetune.lora.targets`: {e}")),
        Ok(found) if found.is_empty() => add("`finetune.lora.targets`: needs at least one".into()),
        Ok(_) => {}
    }
    if model.is_some_and(|model| !GPT::takes_lora(model)) {
        add("`finetune.method`: adapters are for Llamas, the checkpoint is a GPT-NeoX; use `full`"
            .into());
    }
    if !finetune.data.special_tokens.is_empty() {
        add("`finetune.data.special_tokens`: new rows of the embedding need `finetune.method: full`".into());
    }
    if config.precision == Precision::Fp8Mixed {
        add("`precision`: adapters take bf16-mixed, bf16-true or 32-true".into());
    }
    match config.train.activation_checkpointing {
        ActivationCheckpointing::Selective => add(
            "`train.activation_checkpointing`: adapters take `none` or `block`".into(),
        ),
        ActivationCheckpointing::Block if lora.dropout > 0.0 => add(
            "`finetune.lora.dropout`: blocks that are computed again would drop out other values; set it to 0, or \
             `train.activation_checkpointing: none`"
                .into(),
        ),
        _ => {}
    }
}
