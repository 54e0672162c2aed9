//! Tests shared folders and disks whose back end does not exist, ends, or never responds. Tests of working back ends
//! are in `virtio-devices/src/vhost_user/tests/`.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use integration_tests::bare_metal::{SCENARIO_DEADLINE, kvm_opens, start};
use integration_tests::vmm::Vmm;
use serde_json::{Value, json};

/// The first message of the VMM: `VHOST_USER_GET_FEATURES`, version 1, without a body.
const GREETING: [u8; 12] = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// The VMM's next connection, after its first message, which gets no response.
fn greeted(listener: &UnixListener) -> Result<UnixStream> {
    let (mut stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(SCENARIO_DEADLINE))?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    ensure!(greeting == GREETING, "{greeting:?}");
    Ok(stream)
}

fn expect(vmm: &Vmm, endpoint: &str, body: Option<&str>, status: u16) -> Result<()> {
    let answer = vmm.request("PUT", endpoint, body)?;
    ensure!(answer.status == status, "{endpoint} {body:?}: {answer:?}");
    Ok(())
}

#[test]
fn back_end_of_a_folder_that_is_gone_or_silent_holds_up_no_request() -> Result<()> {
    let add = |socket| {
        (
            "vm.add-fs",
            json!({"tag": "b", "socket": socket, "id": "b"}),
        )
    };
    holds_up_no_request(["--fs", "tag=a"], add)
}

#[test]
fn back_end_of_a_disk_that_is_gone_or_silent_holds_up_no_request() -> Result<()> {
    let disk = |socket| json!({"vhost_user": true, "vhost_socket": socket, "id": "b"});
    holds_up_no_request(["--disk", "vhost_user=on"], |socket| {
        ("vm.add-disk", disk(socket))
    })
}

/// `option` without its socket is a device from the start. `add` adds another.
fn holds_up_no_request(
    [option, value]: [&str; 2],
    add: impl FnOnce(PathBuf) -> (&'static str, Value),
) -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    let listener = UnixListener::bind(path("silent"))?;
    let value = format!("{value},socket={}", path("silent").display());
    let shared = ["--memory", "size=256M,shared=on", option, &value];
    let mut vmm = start("spin", &shared)?;
    vmm.wait_api()?;
    // The VMM reconnects after the back end's end.
    drop(greeted(&listener)?);
    let silent = greeted(&listener)?;
    let (endpoint, absent) = add(path("absent"));
    expect(&vmm, endpoint, Some(&absent.to_string()), 200)?;
    expect(&vmm, "vm.pause", None, 204)?;
    expect(&vmm, "vm.resume", None, 204)?;
    // The pause interrupted the handshake.
    let again = greeted(&listener)?;
    expect(&vmm, "vm.remove-device", Some(r#"{"id":"b"}"#), 204)?;
    expect(&vmm, "vm.reboot", None, 204)?;
    let last = greeted(&listener)?;
    expect(&vmm, "vmm.shutdown", None, 200)?;
    vmm.expect_clean_exit(SCENARIO_DEADLINE)?;
    drop((silent, again, last));
    Ok(())
}
