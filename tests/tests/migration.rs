//! Tests moving a running VM between two processes. The guest continuously verifies its memory and its disk.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::bare_metal::{expect_all_passed, kvm_opens, start};
use integration_tests::guest_at_work::{expect_nothing_lost, wait_rounds};
use integration_tests::huge_pages::ReservedHugePages;
use integration_tests::migration::{
    EVENTS, forward_until, free_port, send, send_with, wait_event, while_receiving,
    while_receiving_with,
};
use integration_tests::paths::workspace;
use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};
use integration_tests::wait::wait_for;
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const BALLOON: &[&str] = &["--balloon", "size=0,free_page_reporting=on"];

fn target() -> Result<Vmm> {
    Vmm::start(EVENTS)
}

/// A guest that writes and verifies memory and a disk, and the image of the disk.
fn guest_at_work(memory: &str) -> Result<(Vmm, NamedTempFile)> {
    let image = NamedTempFile::new()?;
    image.as_file().set_len(1 << 20)?;
    let vmm = guest_at_work_on(&image, "raw", memory)?;
    Ok((vmm, image))
}

fn guest_at_work_on(image: &NamedTempFile, image_type: &str, memory: &str) -> Result<Vmm> {
    let disk = format!("path={},image_type={image_type}", image.path().display());
    let arguments = ["--memory", memory, "--disk", &disk];
    let mut vmm = start("chaos", &[&arguments, BALLOON, EVENTS].concat())?;
    vmm.wait_api()?;
    wait_rounds(&vmm, "serial", 0)?;
    Ok(vmm)
}

#[test]
fn guest_at_work_moves_again_and_again_and_loses_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, _image) = guest_at_work("size=256M")?;
    moves_and_loses_nothing(first, 6, &json!({}))
}

#[test]
fn guest_at_work_moves_over_several_connections_and_loses_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, _image) = guest_at_work("size=256M")?;
    moves_and_loses_nothing(first, 4, &json!({"connections": 4}))
}

/// A slow machine only makes the move longer; without the limit, it takes some milliseconds.
#[test]
fn guest_at_work_moves_no_faster_than_its_limit() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, _image) = guest_at_work("size=256M")?;
    let resident = source.get("vm.reclaim-stats")?["resident_bytes"].as_u64();
    let limit = resident.context("resident_bytes")? / 2;
    // The guest writes faster, so the move ends by its time.
    let settings = json!({"bytes_per_second_max": limit, "connections": 2, "timeout_s": 1, "timeout_strategy": "Ignore"});
    let target = target()?;
    let url = format!("unix:{}", target.folder().join("move").display());
    let begun = Instant::now();
    let (status, body) = while_receiving(&target, &url, || send_with(&source, &url, &settings))?;
    ensure!(status == 204, "{status} {body}");
    let took = begun.elapsed();
    let report = wait_event(&source, "migration-finished")?;
    println!("     {limit} bytes per second, {took:?}: {report}");
    let sent: f64 = report["wire_bytes"]
        .as_str()
        .context("wire_bytes")?
        .parse()?;
    // The part that is sent while the guest is paused is not limited.
    ensure!(
        sent / 2.0 <= took.as_secs_f64() * limit as f64,
        "{sent} bytes in {took:?}"
    );
    let now = wait_rounds(&source, "serial", 0)?;
    wait_rounds(&source, "serial", now).map(drop)
}

/// Forwards connections, each at about 3 MB/s to the target, until `end` is dropped.
fn forward_slowly(listener: &UnixListener, target: u16, end: &Receiver<()>) -> Result<()> {
    let (source, _) = listener.accept()?;
    let target = TcpStream::connect(("127.0.0.1", target))?;
    std::thread::scope(|scope| {
        scope.spawn(|| std::io::copy(&mut &target, &mut &source).ok());
        let mut buffer = [0; 16 << 10];
        let pace = Duration::from_millis(5);
        while end.recv_timeout(pace) == Err(RecvTimeoutError::Timeout) {
            match (&source).read(&mut buffer) {
                Ok(count) if count > 0 && (&target).write_all(&buffer[..count]).is_ok() => {}
                _ => break,
            }
        }
        source.shutdown(Shutdown::Both).ok();
        target.shutdown(Shutdown::Both).ok();
    });
    Ok(())
}

/// The guest writes continuously, and no pass leaves less than can be sent in a millisecond.
#[test]
fn guest_that_writes_too_fast_is_slowed_down_and_runs_freely_afterwards() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M")?;
    let mut settings = json!({"downtime_ms": 1, "auto_converge": true, "timeout_s": 600});
    let target = target()?;
    let port = free_port()?;
    // The buffers of a TCP connection would take a whole pass, and the source would find the connection fast.
    let path = source.folder().join("proxy");
    let proxy = UnixListener::bind(&path)?;
    let url = format!("unix:{}", path.display());
    let (status, body) = while_receiving(&target, &format!("tcp:127.0.0.1:{port}"), || {
        send_with(&source, &url, &settings)?;
        let (end, ends) = channel();
        std::thread::scope(|scope| {
            let proxy = &proxy;
            let slow = scope.spawn(move || forward_slowly(proxy, port, &ends));
            let throttled = wait_event(&source, "migration-throttled");
            let info = source.get("vm.info");
            let cancelled = source.put("vm.cancel-migration", None);
            drop(end);
            slow.join().expect("no panic")?;
            println!("     {}", throttled?);
            let info = info?;
            let percent = info["migration_progress"]["throttle_percent"].as_u64();
            ensure!(
                percent.is_some_and(|it| (20..=95).contains(&it)),
                "{info:#}"
            );
            cancelled.map(drop)
        })?;
        wait_event(&source, "migration-failed").map(drop)
    })?;
    ensure!(status == 500, "{status} {body}");
    expect_still_here(&source, &image)?;
    settings["timeout_s"] = 2.into();
    settings["timeout_strategy"] = "Ignore".into();
    let url = format!("unix:{}", target.folder().join("move").display());
    let (status, body) = while_receiving(&target, &url, || send_with(&source, &url, &settings))?;
    ensure!(status == 204, "{status} {body}");
    wait_rounds(&source, "serial", 0).map(drop)
}

/// The folder with these keys.
fn keys(name: &str) -> String {
    let keys = workspace().join("vmm/src/migration/tests/keys").join(name);
    keys.display().to_string()
}

#[test]
fn guest_at_work_moves_over_tls_and_loses_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, _image) = guest_at_work("size=256M")?;
    let settings = json!({"tls_dir": keys("good"), "connections": 2});
    moves_and_loses_nothing(first, 3, &settings)
}

/// Neither side starts anything, and the guest and the target are as before.
#[test]
fn source_and_target_with_other_keys_refuse_each_other_by_name() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M")?;
    let target = target()?;
    let url = format!("tcp:127.0.0.1:{}", free_port()?);
    for (name, text) in [("expired", "xpired"), ("nowhere", "ca-cert.pem")] {
        let body = json!({"destination_url": url, "tls_dir": keys(name)}).to_string();
        let refused = source.request("PUT", "vm.send-migration", Some(&body))?;
        let body = refused.body.unwrap_or_default();
        ensure!(
            refused.status == 400 && body.contains(text),
            "{} {body}",
            refused.status
        );
    }
    let with = |name: &str| json!({"tls_dir": keys(name)});
    let good = with("good");
    let (status, body) = while_receiving_with(&target, &url, &good, || {
        send_with(&source, &url, &with("other"))?;
        let failed = wait_event(&source, "migration-failed")?;
        let error = failed["error"].as_str().context("error")?;
        ensure!(
            error.contains("TLS handshake") && error.contains("UnknownIssuer"),
            "{error}"
        );
        expect_still_here(&source, &image)?;
        ensure!(!target.text("events").contains("migration-receive-started"));
        // The target waits for the right one.
        send_with(&source, &url, &good)
    })?;
    ensure!(status == 204, "{status} {body}");
    wait_rounds(&source, "serial", 0).map(drop)
}

/// The processes map the same pages, one after the other.
#[test]
fn guest_at_work_is_handed_over_again_and_again_and_loses_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (first, _image) = guest_at_work("size=256M,shared=on")?;
    moves_and_loses_nothing(first, 6, &json!({"local": true}))
}

/// There are exactly as many huge pages as the guest has: the target needs none of its own.
#[test]
fn huge_pages_are_handed_over_and_none_is_needed_twice() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let Some(_pool) = ReservedHugePages::new(256 / 2)? else {
        test_skip::skip("the host has too few huge pages of 2 MiB");
        return Ok(());
    };
    let (source, _image) = guest_at_work("size=256M,hugepages=on,hugepage_size=2M")?;
    let target = target()?;
    let url = format!("unix:{}", target.folder().join("move").display());
    let local = json!({"local": true});
    let (status, body) = while_receiving(&target, &url, || send_with(&source, &url, &local))?;
    ensure!(status == 204, "{status} {body}");
    let now = wait_rounds(&source, "serial", 0)?;
    wait_rounds(&source, "serial", now).map(drop)
}

/// The region for hot-plug is a separate file.
#[test]
fn region_of_virtio_mem_is_handed_over_with_ram() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let memory = "size=256M,shared=on,hotplug_method=virtio-mem,hotplug_size=128M";
    let (first, _image) = guest_at_work(memory)?;
    moves_and_loses_nothing(first, 2, &json!({"local": true}))
}

/// Each process opens the image once the previous one has written its tables.
#[test]
fn guest_at_work_on_a_qcow2_disk_moves_and_loses_nothing() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let image = NamedTempFile::new()?;
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"])
        .arg(image.path())
        .arg("1M")
        .output();
    if let Err(error) = made {
        test_skip::skip(format!("no qemu-img: {error}"));
        return Ok(());
    }
    let first = guest_at_work_on(&image, "qcow2", "size=256M")?;
    moves_and_loses_nothing(first, 3, &json!({}))?;
    let checked = Command::new("qemu-img")
        .arg("check")
        .arg(image.path())
        .output()?;
    // The last process was killed: 3 stands for clusters that nothing uses, which is harmless.
    let code = checked.status.code();
    ensure!(matches!(code, Some(0 | 3)), "{checked:?}");
    Ok(())
}

fn moves_and_loses_nothing(first: Vmm, hops: u32, settings: &Value) -> Result<()> {
    let is_local = settings["local"] == true;
    let tls = settings.get("tls_dir");
    let received = tls.map_or(json!({}), |folder| json!({"tls_dir": folder}));
    let mut hosts = vec![first];
    for hop in 0..hops {
        let path = hosts[0].folder().join(format!("move{hop}"));
        let url = match is_local || tls.is_none() && hop % 2 == 0 {
            true => format!("unix:{}", path.display()),
            false => format!("tcp:127.0.0.1:{}", free_port()?),
        };
        let target = target()?;
        let source = hosts.last_mut().context("a source")?;
        let (status, body) = while_receiving_with(&target, &url, &received, || {
            send_with(source, &url, settings)
        })?;
        ensure!(
            status == 204,
            "hop {hop}: {status} {body}\n{}",
            source.stderr()
        );
        let report = wait_event(source, "migration-finished")?;
        println!("     hop {hop} over {url}: {report}");
        if is_local {
            ensure!(report["data_bytes"] == "0", "{report}");
        }
        source.expect_clean_exit(PROCESS_DEADLINE)?;
        ensure!(target.get("vm.info")?["state"] == "Running");
        hosts.push(target);
        // The file was emptied when the target opened it.
        wait_rounds(&hosts[0], "serial", 0)?;
    }
    let last = hosts.last().context("a target")?;
    expect_nothing_lost(&hosts[0], "serial", last)
}

#[test]
fn memory_that_was_given_back_is_neither_sent_nor_resident_and_settings_follow() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    for (memory, local) in [
        ("size=256M", false),
        ("size=256M,shared=on", false),
        ("size=256M,shared=on", true),
    ] {
        let cmdline = ["--cmdline", "scenario=balloon stay", "--memory", memory];
        let mut source = start("balloon", &[BALLOON, EVENTS, &cmdline].concat())?;
        expect_all_passed(&mut source)?;
        let alert = json!({"name": "much", "figure": "resident_bytes", "direction": "above", "enter": 200 << 20, "leave": 100 << 20});
        let body = json!({"alerts": [alert]}).to_string();
        let set = source.request("PUT", "vm.reclaim-thresholds", Some(&body))?;
        ensure!(set.status == 200, "{set:?}");
        source.get("vm.balloon-stats")?;
        let resident = |vmm: &Vmm| -> Result<u64> {
            vmm.get("vm.reclaim-stats")?["resident_bytes"]
                .as_u64()
                .context("resident_bytes")
        };
        let before = resident(&source)?;
        let counters = source.get("vm.counters")?;
        let target = target()?;
        let url = format!("unix:{}", target.folder().join("move").display());
        let settings = json!({"local": local});
        let (status, body) =
            while_receiving(&target, &url, || send_with(&source, &url, &settings))?;
        ensure!(status == 204, "{status} {body}");
        let report = wait_event(&source, "migration-finished")?;
        let wire: u64 = report["wire_bytes"]
            .as_str()
            .context("wire_bytes")?
            .parse()?;
        println!("     {memory} local={local}: {before} bytes resident, {wire} sent: {report}");
        ensure!(wire * 10 <= before * 11, "{wire} bytes for {before}");
        source.expect_clean_exit(PROCESS_DEADLINE)?;
        let after = resident(&target)?;
        ensure!(after <= before + before / 20, "{after} of {before}");
        // The driver, its queues and interrupts continue to work.
        target.get("vm.balloon-stats")?;
        let thresholds = target.get("vm.reclaim-thresholds")?;
        ensure!(thresholds["alerts"][0]["name"] == "much", "{thresholds:#}");
        let now = target.get("vm.counters")?;
        for name in ["report_discarded_bytes", "inflate_discarded_bytes"] {
            let count = |of: &Value| of["__balloon"][name].as_u64();
            ensure!(
                count(&now) >= count(&counters) && count(&now).is_some(),
                "{name}: {now:#}"
            );
        }
    }
    Ok(())
}

/// The VM runs here, and its disk is locked.
fn expect_still_here(source: &Vmm, image: &NamedTempFile) -> Result<()> {
    ensure!(source.get("vm.info")?["state"] == "Running");
    let locks = std::fs::read_to_string("/proc/locks")?;
    let inode = std::os::unix::fs::MetadataExt::ino(&image.as_file().metadata()?);
    ensure!(
        locks
            .lines()
            .any(|lock| lock.contains("WRITE") && lock.contains(&format!(":{inode} "))),
        "no lock on inode {inode}: {locks}"
    );
    let now = wait_rounds(source, "serial", 0)?;
    wait_rounds(source, "serial", now).map(drop)
}

#[test]
fn source_keeps_its_guest_whenever_the_target_dies_or_the_connection_breaks() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M")?;
    for kills in [true, false] {
        for bytes in [100, 100_000, 1_000_000] {
            let target = target()?;
            let kill = target.killer();
            let port = free_port()?;
            let proxy = TcpListener::bind("127.0.0.1:0")?;
            let url = format!("tcp:{}", proxy.local_addr()?);
            let already = source.text("events").matches("migration-failed").count();
            let received = while_receiving(&target, &format!("tcp:127.0.0.1:{port}"), || {
                send(&source, &url)?;
                let (connection, _) = proxy.accept()?;
                let cut = move || {
                    if kills {
                        kill();
                    }
                };
                forward_until(port, bytes, cut)(connection)
            });
            match received {
                Ok((status, body)) => ensure!(status == 500, "{status} {body}"),
                Err(error) => ensure!(kills, "{error:#}"),
            }
            wait_for("the end on the source", PROCESS_DEADLINE, || {
                let failures = source.text("events").matches("migration-failed").count();
                Ok((failures > already).then_some(()))
            })?;
            expect_still_here(&source, &image).with_context(|| format!("{kills} {bytes}"))?;
            if !kills {
                let info = target.request("GET", "vm.info", None)?;
                ensure!(info.status == 404, "{info:?}");
            }
        }
    }
    Ok(())
}

/// Forwards a connection that carries files, and `answers` of the target; calls `cut` when the next one is here.
fn forward_files(
    listener: &UnixListener,
    target: &Path,
    answers: usize,
    cut: impl FnOnce(),
) -> Result<()> {
    const ANSWER_BYTES: usize = 16;
    let (source, _) = listener.accept()?;
    let target = UnixStream::connect(target)?;
    let forward = || -> Option<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let (count, file) = source.recv_with_fd(&mut buffer).ok()?;
            // The kernel ends what it returns behind the byte that carries a file.
            let (last, before) = buffer[..count].split_last()?;
            (&target).write_all(before).ok()?;
            let carried: Vec<_> = file.iter().map(AsRawFd::as_raw_fd).collect();
            target.send_with_fds(&[&[*last][..]], &carried).ok()?;
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(forward);
        let answered = (|| {
            let mut answer = [0; ANSWER_BYTES];
            for _ in 0..answers {
                (&target).read_exact(&mut answer)?;
                (&source).write_all(&answer)?;
            }
            (&target).read_exact(&mut answer)
        })();
        cut();
        source.shutdown(Shutdown::Both).ok();
        target.shutdown(Shutdown::Both).ok();
        answered.map_err(Into::into)
    })
}

/// The target dies with the source's memory mapped: before it has accepted the machine, and after it has created it.
#[test]
fn memory_that_is_handed_over_stays_with_the_side_that_lives() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M,shared=on")?;
    let local = json!({"local": true});
    let folder = tempfile::tempdir()?;
    let proxy = folder.path().join("proxy");
    let listener = UnixListener::bind(&proxy)?;
    let proxy = format!("unix:{}", proxy.display());
    for answers in [0, 1] {
        let target = target()?;
        let kill = target.killer();
        let path = target.folder().join("move");
        let already = source.text("events").matches("migration-failed").count();
        let received = while_receiving(&target, &format!("unix:{}", path.display()), || {
            send_with(&source, &proxy, &local)?;
            forward_files(&listener, &path, answers, kill)
        });
        ensure!(received.is_err(), "the target lives: {received:?}");
        wait_for("the end on the source", PROCESS_DEADLINE, || {
            let failures = source.text("events").matches("migration-failed").count();
            Ok((failures > already).then_some(()))
        })?;
        expect_still_here(&source, &image).with_context(|| format!("{answers} answers"))?;
    }
    // The source dies before the commit: the target drops its copy.
    let target = target()?;
    let (kill, path) = (source.killer(), target.folder().join("move"));
    let (status, body) = while_receiving(&target, &format!("unix:{}", path.display()), || {
        send_with(&source, &proxy, &local)?;
        forward_files(&listener, &path, 1, kill)
    })?;
    ensure!(status == 500 && body.contains("closed"), "{status} {body}");
    let info = target.request("GET", "vm.info", None)?;
    ensure!(info.status == 404, "{info:?}");
    Ok(())
}

#[test]
fn private_memory_is_not_handed_over_and_the_guest_runs_on() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M")?;
    let one = |url: &str, connections: u32| json!({"destination_url": url, "local": true, "connections": connections});
    for (body, text) in [
        (one("unix:/move", 1), "zone mem0"),
        (one("tcp:127.0.0.1:1", 1), "unix:PATH"),
        (one("unix:/move", 2), "connections must be 1"),
    ] {
        let body = body.to_string();
        let refused = source.request("PUT", "vm.send-migration", Some(&body))?;
        let body = refused.body.unwrap_or_default();
        ensure!(
            refused.status == 400 && body.contains(text),
            "{} {body}",
            refused.status
        );
    }
    expect_still_here(&source, &image)
}

/// Lets the target create the machine, and closes the connection before the source learns of that. `hang` is called
/// before.
fn forward_without_the_last_answer(
    source: &TcpStream,
    port: u16,
    hang: impl FnOnce() -> Result<()>,
) -> Result<()> {
    const ANSWER_BYTES: usize = 16;
    let target = TcpStream::connect(("127.0.0.1", port))?;
    let (mut from, mut to) = (&target, source);
    std::thread::scope(|scope| {
        scope.spawn(|| std::io::copy(&mut &*source, &mut &target).ok());
        let answered = (|| {
            let mut answer = [0; ANSWER_BYTES];
            from.read_exact(&mut answer)?;
            to.write_all(&answer)?;
            from.read_exact(&mut answer)?;
            hang()
        })();
        source.shutdown(Shutdown::Both).ok();
        target.shutdown(Shutdown::Both).ok();
        answered
    })
}

#[test]
fn source_whose_disks_are_locked_elsewhere_answers_and_resumes_once_they_are_free() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M")?;
    let target = target()?;
    let (kill, pid) = (target.killer(), target.pid().to_string());
    let port = free_port()?;
    let proxy = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("tcp:{}", proxy.local_addr()?);
    let mut outcome = None;
    let act = || -> Result<()> {
        send(&source, &url)?;
        let (connection, _) = proxy.accept()?;
        forward_without_the_last_answer(&connection, port, || {
            let stopped = Command::new("kill").args(["-STOP", &pid]).status()?;
            ensure!(stopped.success());
            Ok(())
        })?;
        // The control thread does not wait for the disks: it rejects this immediately, and answers that.
        let refused = source.request("PUT", "vm.resume", None)?;
        ensure!(refused.status == 500, "{refused:?}");
        ensure!(source.get("vm.info")?["state"] == "Paused");
        let failed = wait_event(&source, "migration-failed")?;
        let error = failed["error"].as_str().context("error")?;
        ensure!(
            error.contains("stays paused until its disks are free: Cannot lock"),
            "{error}"
        );
        let refused = source.request("PUT", "vm.resume", None)?;
        let body = refused.body.unwrap_or_default();
        ensure!(
            refused.status == 500 && body.contains("Cannot lock"),
            "{body}"
        );
        Ok(())
    };
    let received = while_receiving(&target, &format!("tcp:127.0.0.1:{port}"), || {
        outcome = Some(act());
        kill();
        Ok(())
    });
    outcome.context("it was called")??;
    ensure!(received.is_err(), "{received:?}");
    wait_for("the resumed guest", PROCESS_DEADLINE, || {
        Ok((source.get("vm.info")?["state"] == "Running").then_some(()))
    })?;
    expect_still_here(&source, &image)
}

#[test]
fn target_drops_a_guest_whose_source_dies_and_can_receive_another() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let target = target()?;
    for bytes in [100, 1_000_000] {
        let (mut source, _image) = guest_at_work("size=256M")?;
        let kill = source.killer();
        let port = free_port()?;
        let proxy = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("tcp:{}", proxy.local_addr()?);
        let (status, body) = while_receiving(&target, &format!("tcp:127.0.0.1:{port}"), || {
            send(&source, &url)?;
            let (connection, _) = proxy.accept()?;
            forward_until(port, bytes, kill)(connection)
        })?;
        ensure!(status == 500 && body.contains("closed"), "{status} {body}");
        source.wait_exit(PROCESS_DEADLINE)?;
        let info = target.request("GET", "vm.info", None)?;
        ensure!(info.status == 404, "{info:?}");
    }
    let (source, _image) = guest_at_work("size=256M")?;
    let url = format!("unix:{}", target.folder().join("move").display());
    let (status, body) = while_receiving(&target, &url, || send(&source, &url))?;
    ensure!(status == 204, "{status} {body}");
    wait_rounds(&source, "serial", 0).map(drop)
}

#[test]
fn target_without_memory_refuses_and_the_source_says_why() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=2G")?;
    let target = target()?;
    let pid = target.pid().to_string();
    let limited = Command::new("prlimit")
        .args(["--pid", &pid, "--as=1073741824"])
        .status()?;
    ensure!(limited.success());
    let url = format!("unix:{}", target.folder().join("move").display());
    let (status, body) = while_receiving(&target, &url, || send(&source, &url))?;
    ensure!(
        status == 500 && body.contains("Cannot allocate memory"),
        "{status} {body}"
    );
    let failed = wait_event(&source, "migration-failed")?;
    let error = failed["error"].as_str().context("error")?;
    ensure!(
        error.contains("The peer ended the migration") && error.contains("memory"),
        "{error}"
    );
    expect_still_here(&source, &image)
}

#[test]
fn migration_that_waits_can_be_cancelled_and_blocks_only_changes() -> Result<()> {
    if !kvm_opens() {
        return Ok(());
    }
    let (source, image) = guest_at_work("size=256M")?;
    // Accepts a connection and never answers.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    send(&source, &format!("tcp:{}", silent.local_addr()?))?;
    let _connection = silent.accept()?;
    let info = source.get("vm.info")?;
    ensure!(
        info["state"] == "Running" && info["migration_progress"]["passes"] == 0,
        "{info:#}"
    );
    for endpoint in ["vm.pause", "vm.reboot", "vm.delete"] {
        let refused = source.request("PUT", endpoint, None)?;
        let body = refused.body.unwrap_or_default();
        ensure!(
            refused.status == 500 && body.contains("being migrated"),
            "{endpoint}: {body}"
        );
    }
    source.put("vm.cancel-migration", None)?;
    let failed = wait_event(&source, "migration-failed")?;
    ensure!(failed["error"] == "The migration was cancelled", "{failed}");
    expect_still_here(&source, &image)?;
    ensure!(source.get("vm.info")?.get("migration_progress").is_none());
    // No process listens there.
    send(&source, &format!("tcp:127.0.0.1:{}", free_port()?))?;
    wait_for("the second failure", PROCESS_DEADLINE, || {
        let failures = source.text("events").matches("migration-failed").count();
        Ok((failures == 2).then_some(()))
    })?;
    ensure!(source.text("events").contains("Cannot connect to tcp:"));
    source.put("vm.pause", None).map(drop)
}
