//! Generates `docs/seccomp.md` from the lists that define the filters.

use std::fmt::Write;

use super::calls::{self, Call};
use super::ioctls;
use crate::threads::ThreadKind;

const HEAD: &str = "\
# System calls by thread

This page lists the system calls that each kind of thread may make. `UPDATE_SECCOMP=1 cargo test -p vmm seccomp`
generates it from `vmm/src/seccomp`. Every other call ends the process (`--seccomp true`). Arguments are counted from
0. Several lines for one call are alternatives. A thread that starts others may also make their calls, because a filter
binds all threads started after it.
";

/// The whole document.
pub(super) fn text() -> String {
    let common = calls::EVERY_THREAD;
    let mut text = format!("{HEAD}\n## Every thread\n\n");
    write_calls(&mut text, common.iter());
    for kind in ThreadKind::all() {
        line(&mut text, format_args!("\n## {}\n", name(kind)));
        let own = calls::own(kind).into_iter().flatten();
        write_calls(&mut text, own.skip(common.len()));
        let requests: Vec<_> = ioctls::own(kind)
            .iter()
            .map(|request| format!("`{}`", request.name))
            .collect();
        line(
            &mut text,
            format_args!("- `ioctl`: {}", requests.join(", ")),
        );
        let children: Vec<_> = calls::children(kind).into_iter().map(name).collect();
        if !children.is_empty() {
            line(&mut text, format_args!("- starts: {}", children.join(", ")));
        }
    }
    text
}

fn name(kind: ThreadKind) -> String {
    match kind {
        ThreadKind::Machine(thread) => format!("{thread:?}"),
        own => format!("{own:?}"),
    }
}

/// Writes the calls with any arguments on one line, then each alternative of the others.
fn write_calls<'a>(text: &mut String, calls: impl Iterator<Item = &'a Call>) {
    let (free, bound): (Vec<_>, Vec<_>) = calls.partition(|call| call.conditions.is_empty());
    let free: Vec<_> = free.into_iter().map(short).collect();
    if !free.is_empty() {
        line(text, format_args!("- any arguments: {}", free.join(", ")));
    }
    for call in bound {
        let conditions: Vec<_> = (call.conditions.iter())
            .map(|condition| format!("argument {} {}", condition.argument, condition.text))
            .collect();
        line(
            text,
            format_args!("- {} if {}", short(call), conditions.join(" and ")),
        );
    }
}

fn short(call: &Call) -> String {
    format!("`{}`", call.name.trim_start_matches("SYS_"))
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    writeln!(text, "{line}").expect("a string takes any text");
}
