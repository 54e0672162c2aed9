//! Converts a command to its request.

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use api::{
    Endpoint, HintingAction, ReportingAction, VmBalloonHinting, VmBalloonReporting, VmRemoveDevice,
    VmResize, VmResizeDisk, to_ascii_json,
};

use crate::args::{
    BalloonHintingAction, BalloonReportingAction, BalloonReportingArguments, Bare, Command,
    ResizeArguments,
};

/// Most bytes of a configuration. The VMM takes no longer body.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

/// An endpoint with the body for it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) endpoint: Endpoint,
    pub(crate) body: Option<String>,
    /// Open descriptors of this process that go with it.
    pub(crate) fds: Vec<RawFd>,
}

impl Request {
    /// The request of `command`; `input` stands for standard input.
    pub(crate) fn new(command: &Command, input: &mut dyn Read) -> Result<Self> {
        let endpoint = endpoint(command);
        let body = match command {
            Command::Create(create) => Some(read_config(&create.path, input)?),
            Command::Resize(resize) => Some(to_ascii_json(&resize_body(resize))?),
            Command::ReclaimThresholds(thresholds) => thresholds
                .change()
                .map(|change| to_ascii_json(&change))
                .transpose()?,
            Command::BalloonHinting(hinting) => hinting_body(hinting.action)
                .map(|body| to_ascii_json(&body))
                .transpose()?,
            Command::ResizeDisk(resize) => Some(to_ascii_json(&VmResizeDisk {
                id: resize.disk.clone(),
                desired_size: resize.size,
            })?),
            Command::AddDisk(add) => Some(to_ascii_json(&add.disk)?),
            Command::AddNet(add) => Some(to_ascii_json(&add.net)?),
            Command::AddVsock(add) => Some(to_ascii_json(&add.vsock)?),
            Command::AddBalloon(add) => Some(to_ascii_json(&add.balloon)?),
            Command::RemoveDevice(remove) => {
                let id = remove.id.clone();
                Some(to_ascii_json(&VmRemoveDevice { id })?)
            }
            Command::BalloonReporting(reporting) => reporting_body(reporting)
                .map(|body| to_ascii_json(&body))
                .transpose()?,
            _ => None,
        };
        let fds = match command {
            Command::AddNet(add) => add.net.fds.clone().unwrap_or_default(),
            _ => Vec::new(),
        };
        Ok(Self {
            endpoint,
            body,
            fds,
        })
    }
}

/// The endpoint that `command` calls.
pub(crate) fn endpoint(command: &Command) -> Endpoint {
    match command {
        Command::Bare(Bare(endpoint)) => *endpoint,
        Command::Create(_) => Endpoint::VmCreate,
        Command::Resize(_) => Endpoint::VmResize,
        Command::ResizeDisk(_) => Endpoint::VmResizeDisk,
        Command::AddDisk(_) => Endpoint::VmAddDisk,
        Command::AddNet(_) => Endpoint::VmAddNet,
        Command::AddVsock(_) => Endpoint::VmAddVsock,
        Command::AddBalloon(_) => Endpoint::VmAddBalloon,
        Command::RemoveDevice(_) => Endpoint::VmRemoveDevice,
        Command::ReclaimStats(_) => Endpoint::VmReclaimStats,
        Command::ReclaimThresholds(thresholds) if thresholds.change().is_some() => {
            Endpoint::VmSetReclaimThresholds
        }
        Command::ReclaimThresholds(_) => Endpoint::VmReclaimThresholds,
        Command::BalloonHinting(hinting) => match hinting.action {
            BalloonHintingAction::Status => Endpoint::VmReclaimStats,
            BalloonHintingAction::Start | BalloonHintingAction::Stop => Endpoint::VmBalloonHinting,
        },
        Command::BalloonReporting(reporting) => match reporting.action {
            BalloonReportingAction::Status => Endpoint::VmReclaimStats,
            _ => Endpoint::VmBalloonReporting,
        },
    }
}

fn hinting_body(action: BalloonHintingAction) -> Option<VmBalloonHinting> {
    let action = match action {
        BalloonHintingAction::Start => HintingAction::Start,
        BalloonHintingAction::Stop => HintingAction::Stop,
        BalloonHintingAction::Status => return None,
    };
    Some(VmBalloonHinting { action })
}

fn reporting_body(arguments: &BalloonReportingArguments) -> Option<VmBalloonReporting> {
    let action = match arguments.action {
        BalloonReportingAction::Pause => ReportingAction::Pause,
        BalloonReportingAction::Resume => ReportingAction::Resume,
        BalloonReportingAction::ReportNow => ReportingAction::ReportNow,
        BalloonReportingAction::Status => return None,
    };
    Some(VmBalloonReporting {
        action,
        again: arguments.again,
    })
}

fn resize_body(resize: &ResizeArguments) -> VmResize {
    VmResize {
        desired_vcpus: resize.cpus,
        desired_ram: resize.memory,
        desired_balloon: resize.balloon,
    }
}

/// The configuration as it stands in the file: the VMM is who judges it, and it may know more than this program.
fn read_config(path: &Path, input: &mut dyn Read) -> Result<String> {
    let mut text = String::new();
    if path == Path::new("-") {
        input
            .take(CONFIG_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .context("Cannot read standard input")?;
    } else {
        let failed = || format!("Cannot read {}", path.display());
        let file = File::open(path).with_context(failed)?;
        file.take(CONFIG_BYTES_MAX + 1)
            .read_to_string(&mut text)
            .with_context(failed)?;
    }
    ensure!(
        text.len() as u64 <= CONFIG_BYTES_MAX,
        "The configuration is longer than {CONFIG_BYTES_MAX} bytes"
    );
    Ok(text)
}
