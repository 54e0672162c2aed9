//! The static program inside test guests and inside the testbed's outer machine.
//!
//! As process 1 it is the init of one of the two, distinguished by [`outer::MARK`], which only the outer machine's
//! initramfs has. Under the name `guest-mem` it is the tool that allocates, frees and verifies memory for a test.

mod blocks;
mod churn;
mod cmdline;
mod dirty;
mod disk;
mod disk_bench;
mod disturb;
mod dma;
mod init;
mod mem;
mod modules;
mod net_bench;
mod outer;
mod pattern;
mod random;
mod root;
mod serve;
mod size;
mod stress;
mod sys;
mod tool;
mod vfio;
mod vsock;
mod workload;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 {
        if std::path::Path::new(outer::MARK).exists() {
            outer::main();
        }
        init::main();
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    match tool::run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-mem: {error}");
            ExitCode::FAILURE
        }
    }
}
