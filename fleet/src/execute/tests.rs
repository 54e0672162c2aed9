#![allow(clippy::unwrap_used)]
//! Tests plans whose assumptions no longer hold.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};

use tempfile::TempDir;

use super::*;
use crate::host::Process;
use crate::model::{Bytes, VmId};
use crate::planner::{ActionKind, Phase, Precondition, Reason};

fn action(vm: &str, phase: Phase, from: u64, to: u64, available_min: u64) -> Action {
    Action {
        vm: VmId::from(vm),
        phase,
        kind: ActionKind::Balloon {
            from: Bytes::mib(from),
            to: Bytes::mib(to),
        },
        reason: Reason::Shortage,
        requires: Precondition {
            epoch: 1,
            valid_until_ms: 1000,
            host_available_min: Bytes::mib(available_min),
            balloon_target: Some(Bytes::mib(from)),
        },
    }
}

fn present(now_ms: u64, available_mib: u64) -> Present {
    Present {
        epoch: 1,
        now_ms,
        host_available: Bytes::mib(available_mib),
        balloon_target: Bytes::mib(100),
    }
}

#[test]
fn grant_waits_for_its_memory_and_is_then_handed_over_once() {
    let mut executor = Executor::default();
    executor.replace(vec![
        action("a", Phase::Free, 100, 200, 0),
        action("b", Phase::Grant, 100, 0, 512),
    ]);
    let mut ordered = Vec::new();
    let settled = executor.run(
        |_| Some(present(0, 100)),
        |action| {
            ordered.push(action.vm.clone());
            true
        },
    );
    assert_eq!(settled.len(), 1);
    assert_eq!(executor.waiting().len(), 1);
    executor.run(
        |_| Some(present(500, 600)),
        |action| {
            ordered.push(action.vm.clone());
            true
        },
    );
    assert_eq!(ordered, [VmId::from("a"), VmId::from("b")]);
    assert!(
        executor
            .run(|_| Some(present(600, 600)), |_| true)
            .is_empty()
    );
}

#[test]
fn grant_that_waited_too_long_is_dropped() {
    let mut executor = Executor::default();
    executor.replace(vec![action("b", Phase::Grant, 100, 0, 512)]);
    assert!(executor.run(|_| Some(present(0, 1)), |_| true).is_empty());
    let settled = executor.run(|_| Some(present(1001, 1)), |_| true);
    assert_eq!(settled[0].1, Settled::Dropped(Block::TooOld));
}

#[test]
fn action_on_a_replaced_vm_or_by_another_hand_is_dropped() {
    let mut executor = Executor::default();
    executor.replace(vec![
        action("a", Phase::Free, 100, 200, 0),
        action("b", Phase::Free, 50, 200, 0),
        action("c", Phase::Free, 50, 100, 0),
        action("d", Phase::Free, 100, 200, 0),
    ]);
    let settled = executor.run(
        |action| match action.vm.as_str() {
            "a" => Some(Present {
                epoch: 2,
                ..present(0, 0)
            }),
            "d" => None,
            _ => Some(present(0, 0)),
        },
        |_| panic!("nothing is to be ordered"),
    );
    let blocks: Vec<Settled> = settled.into_iter().map(|(_, settled)| settled).collect();
    assert_eq!(blocks[0], Settled::Dropped(Block::Replaced));
    assert!(matches!(blocks[1], Settled::Dropped(Block::Moved { .. })));
    assert_eq!(blocks[2], Settled::Dropped(Block::Done));
    assert_eq!(blocks[3], Settled::Gone);
}

#[test]
fn limit_is_set_only_where_the_vmm_is_alone() {
    let folder = TempDir::new().unwrap();
    let files = GroupFiles {
        proc: folder.path().join("proc"),
        cgroup_root: folder.path().join("cgroup"),
    };
    let group = files.cgroup_root.join("vms/a");
    fs::create_dir_all(&group).unwrap();
    fs::create_dir_all(files.proc.join("42")).unwrap();
    fs::write(
        files.proc.join("42/cgroup"),
        "1:name=systemd:/x\n0::/vms/a\n",
    )
    .unwrap();
    fs::write(group.join("cgroup.procs"), "42\n43\n").unwrap();
    let shared = files.limit(42, GroupFile::MemoryHigh, Some(Bytes::mib(1)), || true);
    assert!(matches!(shared, Err(GroupError::Shared { .. })));
    // The other one waits for the VMM.
    fs::write(files.proc.join("42/status"), "Name:\tvmm\nPPid:\t43\n").unwrap();
    fs::create_dir_all(files.proc.join("43")).unwrap();
    for (name, members, is_alone) in [
        ("sh\n", "42\n43\n", false),
        ("vmm-waiter\n", "43\n42\n44\n", false),
        ("vmm-waiter\n", "43\n", false),
        ("vmm-waiter\n", "44\n42\n", false),
        ("vmm-waiter\n", "43\n42\n", true),
        ("vmm-waiter\n", "42\n", true),
    ] {
        fs::write(files.proc.join("43/comm"), name).unwrap();
        fs::write(group.join("cgroup.procs"), members).unwrap();
        let limited = files.limit(42, GroupFile::MemoryHigh, None, || true);
        assert_eq!(limited.is_ok(), is_alone, "{name} {members}");
    }
    fs::write(group.join("cgroup.procs"), "42\n").unwrap();
    files
        .limit(42, GroupFile::MemoryHigh, Some(Bytes::mib(1)), || true)
        .unwrap();
    assert_eq!(
        fs::read_to_string(group.join("memory.high")).unwrap(),
        "1048576"
    );
    files
        .limit(42, GroupFile::MemoryMax, None, || true)
        .unwrap();
    assert_eq!(fs::read_to_string(group.join("memory.max")).unwrap(), "max");
    // A process that has ended in the meantime may have had another group.
    let ended = files.limit(42, GroupFile::MemoryMax, Some(Bytes::mib(1)), || false);
    assert!(matches!(ended, Err(GroupError::NoGroup { .. })));
    assert_eq!(fs::read_to_string(group.join("memory.max")).unwrap(), "max");
    // A process without its own group is not limited.
    fs::write(files.proc.join("42/cgroup"), "0::/\n").unwrap();
    assert!(
        files
            .limit(42, GroupFile::MemoryHigh, None, || true)
            .is_err()
    );
}

/// A live process, looked up in `files`.
fn spawn(files: &GroupFiles) -> (Child, Process) {
    let child = Command::new("sleep").arg("600").spawn().unwrap();
    let folder = files.proc.join(child.id().to_string());
    fs::create_dir_all(folder.join("fd")).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
    fs::write(folder.join("stat"), stat).unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let process = Process::hold(&files.proc, pid, None).unwrap();
    (child, process)
}

#[test]
fn only_the_process_that_was_meant_is_killed_and_only_with_a_vm() {
    let folder = TempDir::new().unwrap();
    let files = GroupFiles {
        proc: folder.path().join("proc"),
        cgroup_root: folder.path().join("cgroup"),
    };
    let client = api::Client::new(folder.path().join("no.sock"));
    let (mut meant, process) = spawn(&files);
    let (mut other, successor) = spawn(&files);
    let kill = |now: &Process, to: Option<&Process>| {
        let target = OrderTarget {
            client: &client,
            process: Some(now),
            files: &files,
        };
        target.carry_out(&Addressed {
            order: Order::Kill,
            to: to.cloned(),
        })
    };
    assert!(matches!(kill(&process, None), Err(OrderError::NoProcess)));
    // The process that created the listener, which is not a VMM.
    let refused = kill(&process, Some(&process));
    assert!(
        matches!(refused, Err(OrderError::NoVm { .. })),
        "{refused:?}"
    );
    for pid in [meant.id(), other.id()] {
        symlink("anon_inode:kvm-vm", files.proc.join(format!("{pid}/fd/3"))).unwrap();
    }
    // The VMM was restarted at the same path after the decision.
    let refused = kill(&successor, Some(&process));
    assert!(
        matches!(refused, Err(OrderError::OtherProcess)),
        "{refused:?}"
    );
    assert!(meant.try_wait().unwrap().is_none());
    kill(&process, Some(&process)).unwrap();
    assert_eq!(meant.wait().unwrap().signal(), Some(9));
    // A request for one VMM is not sent to the next one at its socket.
    let pause = Addressed {
        order: Order::Pause,
        to: Some(process.clone()),
    };
    let target = OrderTarget {
        client: &client,
        process: Some(&process),
        files: &files,
    };
    let refused = target.carry_out(&pause);
    assert!(
        matches!(refused, Err(OrderError::OtherProcess)),
        "{refused:?}"
    );
    // Its id may belong to another process by now, and the files here still show a VM.
    let refused = kill(&process, Some(&process));
    assert!(matches!(refused, Err(OrderError::NoProcess)), "{refused:?}");
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
}
