//! The command line of `guest-mem`.

use std::fs::{File, OpenOptions};
use std::io::BufReader;

use crate::mem::Region;
use crate::serve::{Server, allocation};
use crate::{dirty, disk, disk_bench, net_bench, size, stress, sys, vsock, workload};

const USAGE: &str = "usage:
  guest-mem touch --bytes SIZE [--pattern SEED] [--huge default|always|never] [--hold]
  guest-mem fill-verify PATH --bytes SIZE --seed SEED
  guest-mem serve [TERMINAL | vsock PORT]
  guest-mem workload page_fault1|page_fault2|churn|remove|build --tasks N --rounds N [--bytes SIZE]
  guest-mem stress --seconds N --seed N --bytes SIZE [--threads N] [--without NAME]…
  guest-mem dirty --bytes SIZE --per-second SIZE
  guest-mem disk-bench read|write PATH --block SIZE --requests N [--threads N] [--random SEED]
  guest-mem net-bench send|receive|ask ADDRESS:PORT|vsock:PORT --amount N
  guest-mem vsock listen PORT | connect PORT --bytes SIZE --seed SEED";

/// Runs one subcommand.
pub(crate) fn run(args: &[String]) -> Result<(), String> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["touch", options @ ..] => touch(options),
        ["fill-verify", path, "--bytes", bytes, "--seed", seed] => {
            let (bytes, seed) = (size::parse(bytes)?, size::parse(seed)?);
            disk::fill(path, bytes, seed)?;
            disk::verify(path, bytes, seed)?;
            println!("ok fill-verify {bytes} bytes");
            Ok(())
        }
        ["dirty", "--bytes", bytes, "--per-second", rate] => {
            dirty::run(size::parse(bytes)?, size::parse(rate)?)
        }
        ["workload", arguments @ ..] => workload::run(arguments),
        ["stress", arguments @ ..] => stress::run(arguments),
        ["build-step", path, bytes] => workload::build_step(path, size::parse(bytes)?),
        ["disk-bench", arguments @ ..] => disk_bench::run(arguments),
        ["net-bench", arguments @ ..] => net_bench::run(arguments),
        ["vsock", arguments @ ..] => vsock::run(arguments),
        ["serve"] => {
            let mut input = std::io::stdin().lock();
            let mut output = std::io::stdout().lock();
            Server::default()
                .run(&mut input, &mut output)
                .map_err(|error| error.to_string())
        }
        ["serve", "vsock", port] => vsock::serve(port),
        ["serve", terminal] => serve_on(terminal),
        _ => Err(USAGE.into()),
    }
}

fn touch(options: &[&str]) -> Result<(), String> {
    let (mut bytes, mut words, mut hold) = (None, Vec::new(), false);
    let mut rest = options.iter();
    while let Some(option) = rest.next() {
        let mut value = || rest.next().ok_or(USAGE);
        match *option {
            "--bytes" => bytes = Some(*value()?),
            "--pattern" => words.push(format!("seed={}", value()?)),
            "--huge" => words.push(format!("huge={}", value()?)),
            "--hold" => hold = true,
            _ => return Err(USAGE.into()),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let region = Region::new(allocation(bytes.ok_or(USAGE)?, &words)?)?;
    region.verify()?;
    println!("ok touch {} bytes", region.bytes());
    if hold {
        loop {
            std::thread::park();
        }
    }
    Ok(())
}

fn serve_on(terminal: &str) -> Result<(), String> {
    let open = |error| format!("opening {terminal}: {error}");
    let input = File::open(terminal).map_err(open)?;
    let mut output = OpenOptions::new()
        .write(true)
        .open(terminal)
        .map_err(open)?;
    // A pipe or a plain virtio port is not a terminal and needs no settings.
    if std::io::IsTerminal::is_terminal(&input) {
        sys::make_terminal_raw(&input)
            .map_err(|error| format!("settings of {terminal}: {error}"))?;
    }
    Server::default()
        .run(&mut BufReader::new(input), &mut output)
        .map_err(|error| format!("serving on {terminal}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::run;

    fn args(line: &str) -> Vec<String> {
        line.split_ascii_whitespace().map(str::to_string).collect()
    }

    #[test]
    fn tool_touches_and_verifies() {
        run(&args("touch --bytes 256K --pattern 9 --huge never")).unwrap();
    }

    #[test]
    fn tool_with_wrong_arguments_tells_usage() {
        for line in [
            "",
            "touch",
            "touch --bytes",
            "touch --bytes 1M --fast",
            "fill-verify x",
        ] {
            assert!(run(&args(line)).is_err(), "{line}");
        }
    }
}
