//! `ch-fleet doctor`: supported and missing features of this host, with their effects.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use fleet::agent::VmStatus;
use serde::Serialize;

use crate::args::Output;
use crate::ask::Agent;

/// Severity of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Good,
    Note,
    Bad,
}

/// The result of one check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    grade: Grade,
    what: &'static str,
    text: String,
}

fn finding(grade: Grade, what: &'static str, text: impl Into<String>) -> Finding {
    Finding {
        grade,
        what,
        text: text.into(),
    }
}

pub(crate) fn run(agent: &Agent, output: Output, out: &mut dyn Write) -> Result<ExitCode> {
    let mut findings = host(Path::new("/proc"), Path::new("/sys"));
    findings.extend(agent_and_vms(agent));
    let bad = findings.iter().any(|finding| finding.grade == Grade::Bad);
    let text = match output {
        Output::Json => format!("{}\n", api::to_ascii_json(&findings)?),
        Output::Table => findings.iter().map(line).collect(),
    };
    write!(out, "{text}").context("Cannot write the output")?;
    Ok(if bad {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn line(finding: &Finding) -> String {
    let grade = match finding.grade {
        Grade::Good => "ok  ",
        Grade::Note => "note",
        Grade::Bad => "BAD ",
    };
    format!("{grade} {:<12} {}\n", finding.what, finding.text)
}

fn host(proc: &Path, sys: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let pressure = fs::read_to_string(proc.join("pressure/memory"));
    findings.push(match pressure {
        Ok(_) => finding(Grade::Good, "pressure", "the kernel reports memory pressure"),
        Err(error) => finding(
            Grade::Note,
            "pressure",
            format!("no pressure information ({error}): boot with psi=1; until then, only free memory determines the host's state"),
        ),
    });
    let groups = sys.join("fs/cgroup/cgroup.controllers");
    findings.push(match fs::read_to_string(groups) {
        Ok(controllers) if controllers.split_whitespace().any(|name| name == "memory") => {
            finding(Grade::Good, "cgroup", "version 2 with the memory controller")
        }
        _ => finding(
            Grade::Note,
            "cgroup",
            "no version 2 memory controller: host.cgroup, enforce and the limits of last_resort do not work",
        ),
    });
    let swap = fs::read_to_string(proc.join("meminfo"))
        .unwrap_or_default()
        .lines()
        .any(|line| line.starts_with("SwapTotal:") && !line.contains(" 0 kB"));
    findings.push(if swap {
        finding(Grade::Good, "swap", "swap is available for the last resort")
    } else {
        finding(
            Grade::Note,
            "swap",
            "no swap: if guests need memory faster than balloons shrink, the kernel kills VMs",
        )
    });
    let huge = fs::read_to_string(sys.join("kernel/mm/transparent_hugepage/enabled"));
    if let Ok(huge) = huge {
        let text = format!("transparent huge pages: {}", huge.trim());
        findings.push(finding(Grade::Good, "huge pages", text));
    }
    findings
}

fn agent_and_vms(agent: &Agent) -> Vec<Finding> {
    let status = match agent.status() {
        Ok(status) => status,
        Err(error) => {
            let chain = api::error_line(error.as_ref());
            return vec![finding(Grade::Bad, "agent", chain)];
        }
    };
    let mut findings = vec![finding(
        Grade::Good,
        "agent",
        format!("version {}, host {}", status.version, status.host.state),
    )];
    if !status.reload_ok {
        findings.push(finding(
            Grade::Bad,
            "settings",
            "the last reload was rejected; run ch-fleet config check",
        ));
    }
    if !status.host.trigger {
        findings.push(finding(
            Grade::Note,
            "trigger",
            "no pressure trigger: the agent reacts up to one second later",
        ));
    }
    if let Some(store) = &status.store {
        findings.push(match &store.error {
            None if store.registered => finding(
                Grade::Good,
                "store",
                format!(
                    "{} responds in {:.1} ms; this host is registered as {}",
                    store.endpoints.join(", "),
                    store.latency_us as f64 / 1e3,
                    store.host
                ),
            ),
            None => finding(Grade::Note, "store", "this host is not registered yet"),
            Some(error) => finding(
                Grade::Bad,
                "store",
                format!("{error}; the agent still manages this host, but no VMs are placed here"),
            ),
        });
    }
    findings.extend(status.vms.iter().map(vm_finding));
    findings
}

fn vm_finding(vm: &VmStatus) -> Finding {
    let name = &vm.vm;
    match (&vm.failure, vm.level) {
        _ if vm.interlock.as_deref() == Some("huge-pages") => finding(
            Grade::Note,
            "vm",
            format!(
                "{name}: not managed, because its memory comes from the host's pool of huge pages"
            ),
        ),
        (Some(failure), _) if !vm.up && failure == "resident" => finding(
            Grade::Bad,
            "vm",
            format!(
                "{name}: cannot read its resident memory from /proc; the agent takes no memory from it"
            ),
        ),
        (Some(failure), _) if !vm.up => {
            finding(Grade::Bad, "vm", format!("{name}: no response ({failure})"))
        }
        (_, 2) => finding(
            Grade::Good,
            "vm",
            format!(
                "{name}: level 2{}",
                if vm.reporting {
                    ""
                } else {
                    ", free page reporting is inactive"
                }
            ),
        ),
        (_, 1) => finding(
            Grade::Good,
            "vm",
            format!("{name}: level 1, guest statistics only, no reclaim statistics"),
        ),
        _ => finding(
            Grade::Note,
            "vm",
            format!("{name}: level 0, no guest statistics; the agent takes memory in small steps"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_that_has_nothing_is_told_so_without_being_bad() {
        let nowhere = Path::new("/nonexistent");
        let findings = host(nowhere, nowhere);
        assert!(findings.len() >= 3);
        assert!(findings.iter().all(|finding| finding.grade == Grade::Note));
    }

    #[test]
    fn figure_that_cannot_be_read_is_bad_and_named() {
        let vm = VmStatus {
            vm: "web".to_owned(),
            failure: Some("resident".to_owned()),
            ..VmStatus::default()
        };
        let found = vm_finding(&vm);
        assert_eq!(found.grade, Grade::Bad);
        assert!(
            found.text.contains("web: cannot read its resident memory"),
            "{found:?}"
        );
        let huge = VmStatus {
            interlock: Some("huge-pages".to_owned()),
            up: true,
            ..VmStatus::default()
        };
        assert!(vm_finding(&huge).text.contains("huge pages"));
    }
}
