//! Debian packages that a command needs: found, or installed with a word on what and why.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// A package and what it is needed for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    pub(crate) package: &'static str,
    pub(crate) why: &'static str,
}

/// Installs those of `needs` that are missing.
pub(crate) fn ensure(needs: &[Need]) -> Result<()> {
    let missing: Vec<&Need> = needs
        .iter()
        .filter(|need| version(need.package).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    announce(&missing);
    let packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
    if !packages.iter().all(|package| has_candidate(package)) {
        update()?;
    }
    install(&packages, None)
}

/// The installed version of a package.
pub(crate) fn version(package: &str) -> Option<String> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Abbrev} ${Version}", package])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.strip_prefix("ii")?.trim().to_string())
}

/// Installs `need`, from the release's backports if they have it, because they carry a newer
/// version. Without backports the release's own package is taken, which is said.
pub(crate) fn ensure_from_backports(need: Need) -> Result<()> {
    if version(need.package).is_some() {
        return Ok(());
    }
    announce(&[&need]);
    let suite = backports_suite()?;
    if !offers(need.package, &suite) {
        update()?;
    }
    if !offers(need.package, &suite)
        && let Err(error) = add_backports(&suite).and_then(|()| update())
    {
        eprintln!("note: no {suite}: {error:#}");
    }
    if offers(need.package, &suite) {
        return install(&[need.package], Some(&suite));
    }
    eprintln!(
        "note: {suite} does not offer {}; taking the release's own version",
        need.package
    );
    install(&[need.package], None)
}

fn announce(missing: &[&Need]) {
    eprintln!("Installing Debian packages:");
    for need in missing {
        eprintln!("  {:<20} {}", need.package, need.why);
    }
}

/// A command that runs as root: directly, or by sudo.
fn as_root(program: &str) -> Result<Command> {
    // SAFETY: geteuid takes nothing and always succeeds.
    #[allow(unsafe_code)]
    // UNSAFETY: std has no way to ask for the user id.
    let root = unsafe { libc::geteuid() } == 0;
    if root {
        return Ok(Command::new(program));
    }
    if Command::new("sudo")
        .arg("-V")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        bail!("installing packages needs root or sudo");
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    Ok(command)
}

fn apt_get(args: &[&str]) -> Result<()> {
    let status = as_root("env")?
        .arg("DEBIAN_FRONTEND=noninteractive")
        .args(["apt-get", "-qq", "-y"])
        .args(args)
        .stdin(Stdio::null())
        // What a command prints on stdout is its result; apt's talk is not.
        .stdout(std::io::stderr())
        .status()
        .context("starting apt-get")?;
    if !status.success() {
        bail!("apt-get {} failed ({status})", args.join(" "));
    }
    Ok(())
}

/// Refreshes the package lists. A source that cannot be reached is only a warning to apt, and
/// whether it mattered shows when packages are installed.
fn update() -> Result<()> {
    apt_get(&["update"])
}

fn install(packages: &[&str], suite: Option<&str>) -> Result<()> {
    let mut args = vec!["install", "--no-install-recommends"];
    if let Some(suite) = suite {
        args.extend(["-t", suite]);
    }
    args.extend(packages);
    apt_get(&args)
}

fn madison(package: &str) -> String {
    Command::new("apt-cache")
        .args(["madison", package])
        .stderr(Stdio::null())
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default()
}

fn has_candidate(package: &str) -> bool {
    !madison(package).trim().is_empty()
}

fn offers(package: &str, suite: &str) -> bool {
    madison(package).contains(&format!("{suite}/"))
}

fn backports_suite() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no release: packages can be installed on Debian only")?;
    Ok(format!("{}-backports", codename.trim_matches('"')))
}

/// Adds the backports suite at the place the machine already gets its release from.
fn add_backports(suite: &str) -> Result<()> {
    let release = suite.trim_end_matches("-backports");
    let line = archive(release)?.line(suite);
    let path = format!("/etc/apt/sources.list.d/{suite}.list");
    eprintln!("Adding {path}: the {suite} suite of the archive this machine uses already");
    let status = as_root("sh")?
        .args(["-c", "printf '%s\\n' \"$1\" > \"$2\"", "sh", &line, &path])
        .status()
        .context("writing the apt source")?;
    if !status.success() {
        bail!("writing {path} failed ({status})");
    }
    Ok(())
}

/// A line of a source file for another suite of the archive this machine uses.
pub(crate) fn archive_line(suite: &str) -> Result<String> {
    let backports = backports_suite()?;
    Ok(archive(backports.trim_end_matches("-backports"))?.line(suite))
}

/// The archive that this machine gets `release` from.
fn archive(release: &str) -> Result<Source> {
    let mut texts = Vec::new();
    let mut files = vec![Path::new("/etc/apt/sources.list").to_path_buf()];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    for file in files {
        let known = file
            .extension()
            .is_some_and(|e| e == "list" || e == "sources");
        if known && let Ok(text) = fs::read_to_string(&file) {
            texts.push(text);
        }
    }
    texts
        .iter()
        .find_map(|text| find_source(text, release))
        .with_context(|| format!("no apt source of {release} found"))
}

/// An archive, as far as another suite of it needs to be named.
#[derive(Debug, PartialEq, Eq)]
struct Source {
    uri: String,
    signed_by: Option<String>,
}

impl Source {
    fn line(&self, suite: &str) -> String {
        match &self.signed_by {
            Some(key) => format!("deb [signed-by={key}] {} {suite} main", self.uri),
            None => format!("deb {} {suite} main", self.uri),
        }
    }
}

/// Finds the archive that serves `release` in a deb822 or a one-line source file.
fn find_source(text: &str, release: &str) -> Option<Source> {
    text.split("\n\n")
        .find_map(|stanza| from_deb822(stanza, release))
        .or_else(|| text.lines().find_map(|line| from_one_line(line, release)))
}

fn from_deb822(stanza: &str, release: &str) -> Option<Source> {
    let field = |name: &str| {
        stanza
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let serves = field("Suites")?
        .split_whitespace()
        .any(|suite| suite == release);
    let binary = field("Types")?.split_whitespace().any(|kind| kind == "deb");
    if !serves || !binary || field("Enabled") == Some("no") {
        return None;
    }
    Some(Source {
        uri: field("URIs")?.split_whitespace().next()?.to_string(),
        // A key may be in the file itself, which a one-line source cannot say; apt then uses
        // the keys it trusts anyway.
        signed_by: field("Signed-By")
            .filter(|key| key.starts_with('/'))
            .map(str::to_string),
    })
}

fn from_one_line(line: &str, release: &str) -> Option<Source> {
    let mut rest = line.trim().strip_prefix("deb")?.trim_start();
    let mut signed_by = None;
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        signed_by = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="))
            .map(str::to_string);
        rest = after;
    }
    let mut words = rest.split_whitespace();
    let uri = words.next()?.to_string();
    (words.next()? == release).then_some(Source { uri, signed_by })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_in_deb822_is_found_by_release() {
        let text = "Types: deb\n# comment\nURIs: http://archive.example/sec\nSuites: bookworm-security\n\n\
                    Types: deb deb-src\nURIs: http://archive.example/debian\nSuites: bookworm bookworm-updates\n\
                    Signed-By: /usr/share/keyrings/key.gpg\n";
        let source = find_source(text, "bookworm").unwrap();
        assert_eq!(
            source.line("bookworm-backports"),
            "deb [signed-by=/usr/share/keyrings/key.gpg] http://archive.example/debian bookworm-backports main"
        );
        assert_eq!(find_source(text, "trixie"), None);
    }

    #[test]
    fn source_on_one_line_is_found_by_release() {
        let text = "# deb http://archive.example/old bookworm main\n\
                    deb-src http://archive.example/src bookworm main\n\
                    deb [arch=amd64 signed-by=/k.gpg] http://archive.example/debian bookworm main\n";
        assert_eq!(
            find_source(text, "bookworm"),
            Some(Source {
                uri: "http://archive.example/debian".into(),
                signed_by: Some("/k.gpg".into())
            })
        );
    }

    #[test]
    fn source_that_is_disabled_is_not_taken() {
        let text = "Types: deb\nEnabled: no\nURIs: http://archive.example/\nSuites: bookworm\n";
        assert_eq!(find_source(text, "bookworm"), None);
    }
}
