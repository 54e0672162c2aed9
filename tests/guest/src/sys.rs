//! System calls that an init process needs and std does not offer, with errors as `io::Error`.
#![allow(unsafe_code)]
// UNSAFETY: mount, reboot, waitpid, chroot, ioctl and AF_VSOCK have no safe wrapper in std.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr;

/// `_IO('R', 0x07)` of linux/random.h.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(io::Error::other)
}

/// mount(2) after creating the mount point.
pub(crate) fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: libc::c_ulong,
    data: &str,
) -> io::Result<()> {
    std::fs::create_dir_all(target).or_else(|error| {
        // A file may be the target of a bind mount.
        if std::path::Path::new(target).exists() {
            Ok(())
        } else {
            Err(error)
        }
    })?;
    let (source, target) = (c_string(source)?, c_string(target)?);
    let (kind, data) = (c_string(kind)?, c_string(data)?);
    // SAFETY: all four pointers are NUL-terminated strings that live until the call returns.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.as_ptr(),
            flags,
            data.as_ptr().cast(),
        )
    })?;
    Ok(())
}

/// finit_module(2) without parameters; a module that is already loaded is not an error.
pub(crate) fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open and the parameters are a NUL-terminated constant.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        error => Err(error),
    }
}

/// Creates links in /dev that shells expect and no kernel creates.
pub(crate) fn link_standard_streams(dev: &str) -> io::Result<()> {
    for (name, target) in [
        ("fd", "fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
    ] {
        std::os::unix::fs::symlink(format!("/proc/self/{target}"), format!("{dev}/{name}"))?;
    }
    Ok(())
}

/// chroot(2) into `path` and change to its root.
pub(crate) fn chroot(path: &str) -> io::Result<()> {
    let path = c_string(path)?;
    // SAFETY: a NUL-terminated string that lives until the call returns.
    check(unsafe { libc::chroot(path.as_ptr()) })?;
    std::env::set_current_dir("/")
}

/// Writes dirty data to disk and ends the machine. Returns only if the kernel refuses.
pub(crate) fn end_machine(how: libc::c_int) -> io::Error {
    // SAFETY: both calls take no pointers.
    unsafe {
        libc::sync();
        libc::reboot(how);
    }
    io::Error::last_os_error()
}

/// Reaps children until `pid` has ended and returns its status as a shell reports it.
pub(crate) fn reap_until(pid: u32) -> i32 {
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writing during the call.
        let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
        if ended < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return -1;
        }
        if ended == pid.cast_signed() {
            return shell_status(status);
        }
    }
}

/// Reaps one ended child without waiting: its process id and shell status.
pub(crate) fn reap_one() -> Option<(u32, i32)> {
    let mut status = 0;
    // SAFETY: `status` is valid for writing during the call.
    let ended = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (ended > 0).then(|| (ended.cast_unsigned(), shell_status(status)))
}

/// Reaps all children that end, forever.
pub(crate) fn reap_for_ever() -> ! {
    loop {
        // SAFETY: waitpid accepts a null status pointer; pause takes nothing.
        unsafe {
            if libc::waitpid(-1, ptr::null_mut(), 0) < 0 {
                // No child is left, but orphans may be assigned to this process later.
                libc::usleep(100_000);
            }
        }
    }
}

fn shell_status(status: libc::c_int) -> i32 {
    if libc::WIFSIGNALED(status) {
        128 + libc::WTERMSIG(status)
    } else {
        libc::WEXITSTATUS(status)
    }
}

/// Kills every process but this one.
pub(crate) fn kill_all() {
    // SAFETY: kill takes no pointers; -1 never includes the caller itself.
    unsafe {
        libc::kill(-1, libc::SIGKILL);
    }
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> io::Result<()> {
    // SAFETY: ioctl reads `request`, which is fully initialised and outlives the calls; the
    // socket is closed once.
    unsafe {
        let socket = check(libc::socket(
            libc::AF_INET,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            0,
        ))?;
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = (*from).cast_signed();
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        let result = check(libc::ioctl(socket, libc::SIOCSIFFLAGS, &raw const request));
        libc::close(socket);
        result.map(drop)
    }
}

/// A stream socket of the family that connects a guest to its host.
fn vsock_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes no pointer, and the new descriptor has no other owner.
    unsafe {
        let fd = check(libc::socket(libc::AF_VSOCK, kind, 0))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn vsock_address(cid: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    // SAFETY: a structure of integers, for all of which zero is a value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    (address, size_of::<libc::sockaddr_vm>() as libc::socklen_t)
}

/// Listens on a port for programs of the host.
pub(crate) fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    const BACKLOG: libc::c_int = 128;
    let socket = vsock_socket()?;
    let (address, bytes) = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: `address` is initialised and `bytes` long, and is only read during the call.
    unsafe {
        let fd = socket.as_raw_fd();
        check(libc::bind(fd, (&raw const address).cast(), bytes))?;
        check(libc::listen(fd, BACKLOG))?;
    }
    Ok(socket)
}

/// Connects to a port of the host.
pub(crate) fn vsock_connect(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let (address, bytes) = vsock_address(libc::VMADDR_CID_HOST, port);
    // SAFETY: as in `vsock_listen`.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), bytes) })?;
    Ok(socket)
}

/// Waits for the next connection.
pub(crate) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    // SAFETY: accept4 may be called without a buffer for the address; the new descriptor has no other owner.
    unsafe {
        let fd = check(libc::accept4(
            listener.as_raw_fd(),
            ptr::null_mut(),
            ptr::null_mut(),
            libc::SOCK_CLOEXEC,
        ))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Sets the host name.
pub(crate) fn set_hostname(name: &str) -> io::Result<()> {
    // SAFETY: the pointer is valid for `name.len()` bytes.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })?;
    Ok(())
}

/// Sets the clock to this many seconds since 1970.
pub(crate) fn set_clock(seconds: i64) -> io::Result<()> {
    let time = libc::timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    // SAFETY: `time` lives until the call returns.
    check(unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) })?;
    Ok(())
}

/// Adds `seed` to the kernel's entropy and reseeds its generator immediately.
pub(crate) fn reseed(seed: &[u8]) -> io::Result<()> {
    let mut random = File::options().write(true).open("/dev/urandom")?;
    random.write_all(seed)?;
    // SAFETY: the descriptor is open and this request takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) })?;
    Ok(())
}

/// Turns on swapping to a device that has a swap header.
pub(crate) fn swapon(device: &str) -> io::Result<()> {
    let device = c_string(device)?;
    // SAFETY: a NUL-terminated string that lives until the call returns.
    check(unsafe { libc::swapon(device.as_ptr(), 0) })?;
    Ok(())
}

/// Makes a terminal raw, without echo, for a test that controls the other end.
pub(crate) fn make_terminal_raw(terminal: &File) -> io::Result<()> {
    // SAFETY: tcgetattr fills `attributes`, which is zeroed and large enough; tcsetattr reads it.
    unsafe {
        let mut attributes: libc::termios = std::mem::zeroed();
        check(libc::tcgetattr(terminal.as_raw_fd(), &raw mut attributes))?;
        libc::cfmakeraw(&raw mut attributes);
        check(libc::tcsetattr(
            terminal.as_raw_fd(),
            libc::TCSANOW,
            &raw const attributes,
        ))?;
    }
    Ok(())
}

/// For a child before exec: creates a session with `stdin` as its terminal, so that Ctrl-C works in the interactive
/// shell.
pub(crate) fn own_session_on_stdin() -> io::Result<()> {
    // SAFETY: neither call takes a pointer.
    unsafe {
        check(libc::setsid())?;
        check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
    }
    Ok(())
}

/// Waits until one of the files can be read or has hung up, or `timeout_ms` has passed. Returns for each file whether
/// it is ready.
pub(crate) fn wait_readable(
    files: &[Option<&dyn std::os::fd::AsRawFd>; 2],
    timeout_ms: i32,
) -> [bool; 2] {
    let mut polls = files.map(|file| libc::pollfd {
        // A negative descriptor is skipped by poll.
        fd: file.map_or(-1, std::os::fd::AsRawFd::as_raw_fd),
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: `polls` is valid for both reading and writing during the call.
    let count = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) };
    polls.map(|poll| count > 0 && poll.revents != 0)
}

/// Makes `file` non-blocking.
pub(crate) fn set_nonblocking(file: &dyn std::os::fd::AsRawFd) -> io::Result<()> {
    // SAFETY: fcntl with F_SETFL takes no pointer.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) })?;
    Ok(())
}

/// An anonymous mapping that is unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: *mut u64,
    bytes: usize,
    /// `MAP_PRIVATE` or `MAP_SHARED`.
    sharing: libc::c_int,
}

/// Whether the mapping asks for or refuses huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HugePages {
    Default,
    Always,
    Never,
}

impl Mapping {
    /// Maps `bytes` (rounded up to pages by the kernel), not yet populated.
    pub(crate) fn new(bytes: usize, huge: HugePages) -> io::Result<Self> {
        let mapping = Self::map(bytes, libc::MAP_PRIVATE)?;
        let advice = match huge {
            HugePages::Default => return Ok(mapping),
            HugePages::Always => libc::MADV_HUGEPAGE,
            HugePages::Never => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: exactly the new mapping, of which only the paging changes.
        check(unsafe { libc::madvise(mapping.address.cast(), bytes, advice) })?;
        Ok(mapping)
    }

    /// Maps shared memory: its pages are the page cache's, not the process's.
    pub(crate) fn shared(bytes: usize) -> io::Result<Self> {
        Self::map(bytes, libc::MAP_SHARED)
    }

    fn map(bytes: usize, sharing: libc::c_int) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no
        // existing memory.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address.cast(),
            bytes,
            sharing,
        })
    }

    /// Returns a part to the kernel; it reads zero afterwards.
    pub(crate) fn discard(&mut self, offset: usize, bytes: usize) -> io::Result<()> {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset);
        let advice = match self.sharing {
            libc::MAP_SHARED => libc::MADV_REMOVE,
            _ => libc::MADV_DONTNEED,
        };
        let start = self
            .address
            .cast::<libc::c_void>()
            .wrapping_byte_add(offset);
        // SAFETY: the part lies inside the mapping, as just checked, and `&mut self` makes
        // this the only use of it.
        check(unsafe { libc::madvise(start, bytes, advice) }).map(drop)
    }

    /// Maps the first `bytes` of `file` privately: writes stay in this mapping. The file must
    /// not become shorter while the mapping lives.
    pub(crate) fn of_file(file: &File, bytes: usize) -> io::Result<Self> {
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: a mapping at an address of the kernel's choice touches no existing memory;
        // the file is long enough.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                std::os::fd::AsRawFd::as_raw_fd(file),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            address: address.cast(),
            bytes,
            sharing: libc::MAP_PRIVATE,
        })
    }

    /// The mapping as words.
    pub(crate) fn words(&self) -> &[u64] {
        // SAFETY: the mapping is readable, zero-initialised by the kernel, aligned to a page,
        // and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes / 8) }
    }

    /// The first word as it is now: a device may write to the mapping.
    pub(crate) fn volatile_word(&self) -> u64 {
        // SAFETY: as in `words`.
        unsafe { self.address.read_volatile() }
    }

    /// Writes one byte, so that its page is allocated, even if the byte does not change.
    pub(crate) fn write_byte(&mut self, offset: usize, value: u8) {
        assert!(offset < self.bytes);
        // SAFETY: the byte is inside the mapping, as just checked, and `&mut self` makes this the only access.
        unsafe { self.address.cast::<u8>().add(offset).write_volatile(value) };
    }

    /// The mapping as words to be written.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        // SAFETY: as in `words`, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes / 8) }
    }

    /// The mapping as bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: as in `words`; bytes need no alignment, and all values are valid.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.bytes) }
    }

    /// The mapping as bytes to be written.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that mmap returned, unmapped once.
        unsafe {
            libc::munmap(self.address.cast(), self.bytes);
        }
    }
}

/// Blocks in `read` until the power button is pressed on one input event device.
pub(crate) fn wait_power_button(device: &mut File) -> io::Result<()> {
    const EV_KEY: u16 = 1;
    const KEY_POWER: u16 = 116;
    // struct input_event on 64 bits: two 8-byte time fields, type, code, value.
    let mut event = [0u8; 24];
    loop {
        device.read_exact(&mut event)?;
        let kind = u16::from_ne_bytes([event[16], event[17]]);
        let code = u16::from_ne_bytes([event[18], event[19]]);
        let value = u32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
        if (kind, code, value) == (EV_KEY, KEY_POWER, 1) {
            return Ok(());
        }
    }
}
