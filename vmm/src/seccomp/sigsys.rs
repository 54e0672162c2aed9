//! Logs the thread and the forbidden system call before the process ends (`--seccomp true`).

// UNSAFETY: a signal handler reads what the kernel left on the stack and may only call what is async-signal-safe.
#![allow(unsafe_code)]

use vmm_sys_util::errno;
use vmm_sys_util::signal::register_signal_handler;

/// Exit status of a process that its own filter stopped: a shell's status for a death by SIGSYS.
const EXIT_STATUS: libc::c_int = 128 + libc::SIGSYS;
/// Offset of `si_syscall` in `siginfo_t` on 64-bit Linux: after three integers, padding and `si_call_addr`
/// (asm-generic/siginfo.h). The libc crate does not name it.
const SI_SYSCALL_OFFSET: usize = 24;
/// Length of a thread name with its terminator (`TASK_COMM_LEN`).
const THREAD_NAME_BYTES: usize = 16;

const _: () = assert!(size_of::<libc::siginfo_t>() >= SI_SYSCALL_OFFSET + size_of::<libc::c_int>());

/// Installs the handler for the whole process.
pub(super) fn install() -> Result<(), errno::Error> {
    register_signal_handler(libc::SIGSYS, on_bad_syscall)
}

extern "C" fn on_bad_syscall(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    let mut name = [0u8; THREAD_NAME_BYTES];
    // SAFETY: the kernel passes a valid siginfo, large enough by the assertion above; the name fits its buffer, which
    // this command is documented to fill with at most 16 bytes.
    let number = unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        info.cast::<u8>()
            .add(SI_SYSCALL_OFFSET)
            .cast::<libc::c_int>()
            .read_unaligned()
    };
    let name_len = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    let mut digits = [0u8; 12];
    for part in [
        b"cloud-hypervisor: seccomp: thread ".as_slice(),
        &name[..name_len],
        b" made the forbidden system call ",
        decimal(number, &mut digits),
        b"; ending the process. --seccomp log tells of such calls without ending it.\n",
    ] {
        // SAFETY: `write` is async-signal-safe and reads live bytes. A failure cannot be reported.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    machine::serial::restore_terminal();
    // SAFETY: ends the process without running any code of the interrupted program.
    unsafe { libc::_exit(EXIT_STATUS) }
}

/// Writes a number without allocating.
fn decimal(number: libc::c_int, digits: &mut [u8; 12]) -> &[u8] {
    let mut rest = number.unsigned_abs();
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if number < 0 {
        at -= 1;
        digits[at] = b'-';
    }
    &digits[at..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_writes_every_number() {
        for number in [0, 7, 10, 435, -1, i32::MAX, i32::MIN] {
            let mut digits = [0; 12];
            assert_eq!(decimal(number, &mut digits), number.to_string().as_bytes());
        }
    }
}
