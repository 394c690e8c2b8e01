//! Stopping on SIGINT and SIGTERM: the first asks the loop to save and leave, a later one leaves at
//! once.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Signals this close together are one request: `timeout` and schedulers signal a process and then its
/// whole group, so that it gets the same signal twice.
const TOGETHER: Duration = Duration::from_secs(1);

/// A request to stop, made by Ctrl-C (SIGINT) or by a scheduler (SIGTERM). The loop asks between
/// steps.
pub struct StopSignal {
    /// Number of the signal that came; 0: none yet.
    signal: Arc<AtomicUsize>,
}

impl StopSignal {
    /// Starts a thread that listens for the rest of the process.
    ///
    /// With `second_ends` another signal, of either kind and more than a second after the first, ends the
    /// process at once with [`exit_code`]: the way out where saving hangs. Not so for one rank of several:
    /// those who started it may send the same signal twice, and kill it in the end.
    ///
    /// # Errors
    /// Where the system refuses a handler.
    pub fn install(second_ends: bool) -> Result<StopSignal> {
        let mut signals = Signals::new([SIGINT, SIGTERM])
            .context("cannot install the handlers of SIGINT and SIGTERM")?;
        let signal = Arc::new(AtomicUsize::new(0));
        let stop = StopSignal { signal: Arc::clone(&signal) };
        std::thread::spawn(move || {
            let mut first = None;
            for number in signals.forever() {
                signal.store(number as usize, Ordering::Relaxed);
                let first: Instant = *first.get_or_insert_with(Instant::now);
                if second_ends && first.elapsed() > TOGETHER {
                    low_level::exit(exit_code(number).into());
                }
            }
        });
        Ok(stop)
    }

    /// The signal that asked to stop, if one did. Costs one atomic load.
    pub fn requested(&self) -> Option<i32> {
        match self.signal.load(Ordering::Relaxed) {
            0 => None,
            number => Some(number as i32),
        }
    }
}

/// Exit code of a process that a signal stopped: 130 for SIGINT, 143 for SIGTERM.
pub fn exit_code(signal: i32) -> u8 {
    128 + signal as u8
}

/// `SIGINT`, `SIGTERM`: how the log names a signal.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

#[cfg(test)]
mod tests {
    use super::*;
    use signal_hook::low_level::raise;
    use std::process::Command;

    /// Raises signals in a child process: this very test binary, told by a variable which ones.
    fn code_after(signals: &str) -> Option<i32> {
        code_of(&mut Command::new(std::env::current_exe().unwrap()), signals)
    }

    fn code_of(child: &mut Command, signals: &str) -> Option<i32> {
        child
            .args(["--exact", "train::signals::tests::child", "--ignored", "--test-threads=1"])
            .env("TL_TEST_SIGNALS", signals)
            .output()
            .unwrap()
            .status
            .code()
    }

    #[test]
    #[ignore = "the child of the tests below"]
    fn child() {
        let signals = std::env::var("TL_TEST_SIGNALS").unwrap_or_default();
        let stop = StopSignal::install(std::env::var_os("TL_TEST_PATIENT").is_none()).unwrap();
        assert_eq!(stop.requested(), None);
        for word in signals.split(',') {
            match word.parse() {
                Ok(signal) => raise(signal).unwrap(),
                Err(_) => std::thread::sleep(TOGETHER + Duration::from_millis(200)),
            }
        }
        std::thread::sleep(Duration::from_millis(200)); // the listener's turn
        std::process::exit(stop.requested().unwrap_or(0)); // not reached after a second signal
    }

    #[test]
    fn the_first_signal_is_noted_and_the_process_goes_on() {
        assert_eq!(code_after("2"), Some(SIGINT));
        assert_eq!(code_after("15"), Some(SIGTERM));
    }

    #[test]
    fn signals_that_come_together_are_one_request() {
        assert_eq!(code_after("15,15"), Some(SIGTERM));
        assert_eq!(code_after("2,2"), Some(SIGINT));
    }

    #[test]
    fn a_rank_of_several_notes_a_second_signal_and_goes_on() {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let signals = "15,wait,15";
        assert_eq!(code_of(child.env("TL_TEST_PATIENT", "1"), signals), Some(SIGTERM));
    }

    #[test]
    fn a_later_signal_of_either_kind_exits_at_once() {
        assert_eq!(code_after("2,wait,2"), Some(130));
        assert_eq!(code_after("15,wait,15"), Some(143));
        assert_eq!(code_after("15,wait,2"), Some(130));
    }

    #[test]
    fn signals_have_names_and_exit_codes() {
        assert_eq!((name(SIGINT), exit_code(SIGINT)), ("SIGINT", crate::error::exit::INTERRUPTED));
        assert_eq!(
            (name(SIGTERM), exit_code(SIGTERM)),
            ("SIGTERM", crate::error::exit::TERMINATED)
        );
    }
}
