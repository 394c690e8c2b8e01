//! The folder of a run: whether it can be there, what is in it to go on from, and the log.

use super::metrics::{RunLog, Totals};
use crate::config::{self, BatchPlan, Resume, RunConfig};
use crate::error::WithHint;
use crate::{bail_hint, checkpoint};
use anyhow::{Context, Result, anyhow};
use rustix::fs::Access;
use std::path::{Path, PathBuf};

/// Whether the run's folder can be there, before it is.
pub(super) fn check(out_dir: &Path) -> Result<()> {
    let here = Path::new(".");
    let there = out_dir.ancestors().find(|dir| dir.exists()).filter(|dir| *dir != Path::new(""));
    let there = there.unwrap_or(here);
    let why = match rustix::fs::access(there, Access::WRITE_OK | Access::EXEC_OK) {
        _ if !there.is_dir() => "is no folder".to_owned(),
        Err(e) => format!("cannot be written to: {}", std::io::Error::from(e)),
        Ok(()) => return Ok(()),
    };
    Err(anyhow!(
        "`out_dir`: `{}` cannot be created, `{}` {why}",
        out_dir.display(),
        there.display()
    ))
    .hint("name a folder that can be written")
}

/// The run's folder, and what is logged there.
pub(super) fn open_log(
    config: &RunConfig,
    plan: &BatchPlan,
    resumed: Option<u64>,
) -> Result<RunLog> {
    std::fs::create_dir_all(&config.out_dir)
        .with_context(|| format!("cannot create `{}`", config.out_dir.display()))?;
    for path in
        resumed.map_or(Ok(Vec::new()), |step| checkpoint::set_aside_later(&config.out_dir, step))?
    {
        eprintln!("aside       a later checkpoint is now {}", path.display());
    }
    config::save_resolved(config, &config.out_dir.join("config.yaml"))?;
    let totals = Totals { steps: plan.total_steps, tokens: plan.total_tokens() };
    RunLog::open(&config.out_dir, resumed, totals, false)
}

/// The checkpoint to resume from, by `resume:`; refuses to mix a new run into an old one's folder.
pub(super) fn find_resume(config: &RunConfig) -> Result<Option<PathBuf>> {
    match (&config.resume, checkpoint::latest(&config.out_dir)?) {
        (Resume::Switch(false), Some(found)) => bail_hint!(
            "continue it with `--resume auto`, or choose another `out_dir`";
            "`out_dir` holds a run already: found `{}`", found.display()
        ),
        (Resume::Text(path), newest) if path != "auto" => {
            let dir = checkpoint::resolve(path.as_ref())?;
            let own = |path: &Path| Some(path.canonicalize().ok()?.parent()?.to_owned());
            if let Some(found) = newest.filter(|found| own(found) != own(&dir)) {
                bail_hint!(
                    "continue what is there with `--resume auto`, or choose another `out_dir`";
                    "`out_dir` holds another run than `{}`: found `{}`", dir.display(), found.display()
                );
            }
            if dir.join("train_state").is_dir() {
                return Ok(Some(dir));
            }
            Err(anyhow!("`{}` has no `train_state/` to resume from", dir.display()))
                .hint("start from its weights alone with `initial_checkpoint_dir`")
        }
        (_, newest) => checkpoint::check_final(&config.out_dir).map(|()| newest),
    }
}
