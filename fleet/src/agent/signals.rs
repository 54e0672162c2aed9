//! SIGHUP reloads, SIGTERM and SIGINT end.

use std::io;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Reload,
    Stop,
}

/// Calls `ask` for each signal, on a thread that lives as long as the process.
pub(super) fn forward(ask: impl Fn(Asked) + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGTERM, SIGINT])?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                ask(if signal == SIGHUP {
                    Asked::Reload
                } else {
                    Asked::Stop
                });
            }
        })?;
    Ok(())
}
