//! Pretraining: the loop, from top to bottom.

use super::run::{Run, TakenStep};
use super::signals::StopSignal;
use super::{LOWER, plot, saver};
use crate::config::{OnSaveError, RunConfig};
use crate::error::{WithHint, exit};
use crate::generate::{GenerateOptions, generate_text};
use crate::guard;
use anyhow::{Result, anyhow};
use std::path::Path;
use std::time::Instant;

/// Trains until `max_steps`, `max_tokens` or `max_time`, or a signal. Returns the exit code: 0, or
/// 130/143 where SIGINT/SIGTERM stopped it; both after a checkpoint was written.
///
/// # Errors
/// Bad data, a full disk, CUDA out of memory, a loss or gradient that is not finite.
///
/// # Sync
/// The CPU waits for the GPU once a step, when it reads loss and gradient norm.
pub fn pretrain(config: &RunConfig) -> Result<u8> {
    let mut run = Run::assemble(config)?;
    let stop = StopSignal::install()?;
    let (train, eval) = (&config.train, &config.eval);

    if eval.initial_validation && run.progress.step == 0 {
        run.validate(eval.max_iters)?;
    }
    let due = |interval: Option<u64>, step: u64| interval.is_some_and(|n| step.is_multiple_of(n));

    while !run.finished() {
        // ---- one optimizer step ----------------------------------------------------------------
        let started = Instant::now();
        let TakenStep { step, lr, loss, grad_norm } = run.take_step()?; // the CPU waits for the GPU
        check_finite(&run, step, loss, grad_norm)?;
        run.optimizer.zero_grad();
        run.advance();

        // ---- log, validate, save ---------------------------------------------------------------
        if due(Some(train.log_interval), step) || run.finished() {
            run.log_step(loss, lr, grad_norm, started.elapsed().as_secs_f64())?;
        }
        if due(eval.interval, step) && !run.finished() {
            run.validate(eval.max_iters)?;
        }
        if due(train.save_interval, step) && !run.finished() {
            save_periodic(&mut run, step)?;
        }
        if let Some(signal) = stop.requested() {
            let path = saver::save(&mut run, &format!("step-{step:08}"))?;
            run.log.finish()?;
            eprintln!("stopped by signal {signal}; saved {}", path.display());
            eprintln!("continue with the same command and `--resume auto`");
            return Ok(if signal == 2 { exit::INTERRUPTED } else { exit::TERMINATED });
        }
    }
    finish(&mut run)
}

/// A loss or gradient that is not finite ends the run before it touches the weights.
fn check_finite(run: &Run, step: u64, loss: f64, grad_norm: f64) -> Result<()> {
    if loss.is_finite() && grad_norm.is_finite() {
        return Ok(());
    }
    let names = run.optimizer.non_finite();
    let shown = match names.as_slice() {
        [] => "no parameter alone (their sum overflows)".to_owned(),
        [one] => format!("`{one}`"),
        [first, .., last] => format!("{} parameters, from `{first}` to `{last}`", names.len()),
    };
    let last = match &run.last_checkpoint {
        Some(path) => format!("the last good checkpoint is `{}`", path.display()),
        None => "no checkpoint was written yet".to_owned(),
    };
    let error =
        anyhow!("step {step}: loss {loss}, gradient norm {grad_norm}; not finite in {shown}");
    Err(error)
        .hint(format!("{last}; resume from it with a lower `optimizer.lr`, or look at the data"))
}

/// A periodic checkpoint; a failure ends the run or not, as `train.on_save_error` says. Earlier
/// checkpoints are untouched either way.
fn save_periodic(run: &mut Run, step: u64) -> Result<()> {
    let saved = saver::save(run, &format!("step-{step:08}"));
    match (saved, run.config.train.on_save_error) {
        (Ok(path), _) => run.log.note(&format!("saved {}", path.display())),
        (Err(e), OnSaveError::Stop) => return Err(e),
        (Err(e), OnSaveError::Continue) => {
            run.log.note(&format!("warning: checkpoint of step {step} not written: {e:#}"));
        }
    }
    Ok(())
}

/// Final validation and checkpoint, loss curve, sample, and what to do next.
fn finish(run: &mut Run) -> Result<u8> {
    if run.config.eval.final_validation {
        run.validate(None)?;
    }
    let path = saver::save(run, "final")?;
    run.log.finish()?;
    let curve = run.config.out_dir.join("loss.png");
    plot::loss_curve(&run.config.out_dir.join("metrics.jsonl"), &curve)?;
    print_sample(run)?;
    next_steps(&path, &curve);
    Ok(exit::OK)
}

/// The continuation of `train.sample_prompt`, as a taste of the model.
fn print_sample(run: &Run) -> Result<()> {
    let (Some(prompt), Some(tokenizer)) = (&run.config.train.sample_prompt, &run.tokenizer) else {
        return Ok(());
    };
    let options = GenerateOptions {
        max_new_tokens: 60,
        eos: tokenizer.eos_id().into_iter().collect(),
        vocab_size: Some(tokenizer.vocab_size()),
        ..GenerateOptions::default()
    };
    let ids = tokenizer.encode(prompt, tokenizer.use_bos(), false)?;
    eprintln!("\nsample:");
    print!("{prompt}");
    let mut show = |piece: &str| -> Result<()> {
        print!("{piece}");
        Ok(())
    };
    guard::catch("generation", run.device, LOWER, || {
        generate_text(&run.model, tokenizer, &ids, &options, &[], &mut show)
    })?;
    println!();
    Ok(())
}

fn next_steps(checkpoint: &Path, curve: &Path) {
    let dir = checkpoint.display();
    eprintln!("\ncheckpoint  {dir}");
    eprintln!("loss curve  {}", curve.display());
    eprintln!("\ntry next:");
    eprintln!("  ./scripts/run.sh generate --checkpoint {dir} --prompt \"We the people\"");
    eprintln!(
        "  ./scripts/run.sh score --checkpoint {dir} --text \"The state of the union is strong.\""
    );
    eprintln!("  python: transformers.AutoModelForCausalLM.from_pretrained(\"{dir}\")");
}
