//! Ctrl-C, SIGTERM and SIGHUP: the first asks for a clean stop, the second ends the process at once.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// The shell's exit code of a process ended by Ctrl-C.
const EXIT_INTERRUPTED: i32 = 130;

/// Whether the user has asked for a stop.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Whether a stop was asked for.
    pub fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Installs the handler, once per process.
///
/// # Errors
/// [`Error::Internal`] when a handler is installed already or the system refuses.
pub fn install() -> Result<Interrupt> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&flag);
    let handler = move || {
        if seen.swap(true, Ordering::Relaxed) {
            process::exit(EXIT_INTERRUPTED);
        }
        eprintln!("stopping cleanly; press Ctrl-C again to end at once");
    };
    let internal = |e: ctrlc::Error| Error::Internal { thread: "the signal handler".into(), message: e.to_string() };
    ctrlc::set_handler(handler).map_err(internal)?;
    Ok(Interrupt(flag))
}

#[cfg(all(test, unix))]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    const IN_CHILD: &str = "SIMSIAM_TEST_SIGNAL_CHILD";

    /// Runs only in the child processes of the tests below: a handler is for a whole process.
    #[test]
    fn child() {
        let Ok(mode) = std::env::var(IN_CHILD) else { return };
        let interrupt = install().unwrap();
        assert!(install().is_err() && !interrupt.interrupted());
        println!("\nready");
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut told = false;
        while Instant::now() < deadline {
            if interrupt.interrupted() && !told {
                told = true;
                println!("\nasked to stop");
                if mode == "obedient" {
                    process::exit(0);
                }
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        process::exit(99);
    }

    fn start(mode: &str) -> (Child, impl FnMut(&str)) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cli::signals::tests::child", "--nocapture"])
            .env(IN_CHILD, mode)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wait_for = move |text: &str| assert!(lines.any(|line| line.unwrap() == text), "child never said {text}");
        (child, wait_for)
    }

    fn send(signal: &str, child: &Child) {
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    }

    #[test]
    fn first_signal_asks_for_a_stop() {
        for signal in ["-INT", "-TERM"] {
            let (mut child, mut wait_for) = start("obedient");
            wait_for("ready");
            send(signal, &child);
            wait_for("asked to stop");
            assert_eq!(child.wait().unwrap().code(), Some(0), "{signal}");
        }
    }

    #[test]
    fn second_signal_ends_at_once() {
        let (mut child, mut wait_for) = start("stubborn");
        wait_for("ready");
        send("-INT", &child);
        wait_for("asked to stop");
        send("-TERM", &child);
        assert_eq!(child.wait().unwrap().code(), Some(EXIT_INTERRUPTED));
    }
}
