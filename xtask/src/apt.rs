//! Finds or installs the Debian packages that a command needs, and lists them with the reasons. Also downloads packages
//! without installing them.

use std::fs;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::guest::cache::Lock;
use crate::progress::note;
use crate::{disk, paths};

/// A package and its purpose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    pub(crate) package: &'static str,
    pub(crate) why: &'static str,
}

/// Installs the missing packages of `needs`.
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
    let not_on_offer = || packages.iter().find(|package| !has_candidate(package));
    if not_on_offer().is_some() {
        let said = update()?;
        if let Some(package) = not_on_offer() {
            bail!("apt offers no {package}: {}", why_not_on_offer(&said));
        }
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

/// Installs `need`, from the release's backports if available, because they have a newer version. Without backports the
/// release's own package is installed, and this is printed.
pub(crate) fn ensure_from_backports(need: Need) -> Result<()> {
    if version(need.package).is_some() {
        return Ok(());
    }
    announce(&[&need]);
    let suite = backports_suite()?;
    let mut said = String::new();
    if !offers(need.package, &suite) {
        said = update()?;
    }
    if !offers(need.package, &suite) {
        match add_backports(&suite).and_then(|()| update()) {
            Ok(warnings) => said = warnings,
            Err(error) => note(&format!("note: no {suite}: {error:#}")),
        }
    }
    if offers(need.package, &suite) {
        return install(&[need.package], Some(&suite));
    }
    ensure!(
        has_candidate(need.package),
        "apt offers no {}: {}",
        need.package,
        why_not_on_offer(&said)
    );
    note(&format!(
        "note: {suite} does not offer {}; taking the release's own version",
        need.package
    ));
    install(&[need.package], None)
}

fn announce(missing: &[&Need]) {
    note("Installing Debian packages:");
    for need in missing {
        note(&format!("  {:<20} {}", need.package, need.why));
    }
}

/// A command that runs as root: directly, or through sudo. `task` completes the message if neither works.
pub(crate) fn as_root(program: &str, task: &str) -> Result<Command> {
    // SAFETY: geteuid has no arguments and always succeeds.
    #[allow(unsafe_code)]
    // UNSAFETY: std has no way to ask for the user id.
    let root = unsafe { libc::geteuid() } == 0;
    if root {
        return Ok(Command::new(program));
    }
    through_sudo("sudo", program, task)
}

/// `program` through `sudo`, if that works for this user.
fn through_sudo(sudo: &str, program: &str, task: &str) -> Result<Command> {
    // Without a terminal sudo cannot ask for a password.
    let mut check = Command::new(sudo);
    if std::io::stdin().is_terminal() {
        check.arg("-V");
    } else {
        check.args(["-n", "true"]);
    }
    let works = check
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    ensure!(
        works,
        "{task} needs root: run it as root once, or set up sudo for this user"
    );
    let mut command = Command::new(sudo);
    command.arg(program);
    Ok(command)
}

/// Runs apt-get as root, while no other of our commands does, because it does not wait for another one. Returns its
/// warnings.
fn apt_get(args: &[&str]) -> Result<String> {
    let task = format!("apt-get {}", args.join(" "));
    let _lock = Lock::take_named(
        &paths::cache()?,
        "apt-lock",
        "another command to install its packages",
    )?;
    let mut command = as_root("env", &task)?;
    command
        .args(["DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"])
        .args(["apt-get", "-qq", "-y"])
        .args(args);
    run_apt(command, &task)
}

/// Runs it without its lines per package, which are useless unless it fails. Returns its warnings.
fn run_apt(mut command: Command, task: &str) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output()
        .context(NO_APT)?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(NOT_FOUND) {
        bail!("{task}: {NO_APT}");
    }
    if !output.status.success() {
        for line in said.lines() {
            note(line);
        }
        bail!("{task} failed ({}): {}", output.status, advice(&said));
    }
    Ok(said.into_owned())
}

const NO_APT: &str = "apt-get is missing: packages can be installed only on Debian";
/// The status of env(1) and sudo(8) for a program that does not exist.
const NOT_FOUND: i32 = 127;

/// The remedy for the failure that apt's messages describe.
fn advice(said: &str) -> &'static str {
    known_advice(said).unwrap_or("see its messages above")
}

fn known_advice(said: &str) -> Option<&'static str> {
    let known: [(&[&str], &str); 6] = [
        (
            &["Could not get lock", "Unable to lock"],
            "another apt or dpkg is running; wait until it has ended, then run this command again",
        ),
        (
            &["dpkg was interrupted"],
            "run `dpkg --configure -a` as root, then run this command again",
        ),
        (
            &["No space left", "enough free space"],
            "the disk is full; free some space (`apt-get clean` helps), then run this command again",
        ),
        (
            &[
                "Unable to locate package",
                "no installation candidate",
                "Unable to find",
            ],
            "this release does not offer the package; Debian 12 and 13 do",
        ),
        (
            &["Hash Sum mismatch", "unexpected size"],
            "the download is damaged or the mirror is being updated; run this command again in a few minutes",
        ),
        (
            &[
                "Could not resolve",
                "Temporary failure",
                "Could not connect",
                "Cannot initiate the connection",
                "Failed to fetch",
                "Network is unreachable",
            ],
            "the package archive cannot be reached; check the network and apt's proxy, then run this command again",
        ),
    ];
    known
        .into_iter()
        .find(|(words, _)| words.iter().any(|word| said.contains(word)))
        .map(|(_, what)| what)
}

/// Refreshes the package lists and returns apt's warnings. A source that cannot be reached is only a warning: it matters
/// if a package is missing afterwards, see [`why_not_on_offer`].
fn update() -> Result<String> {
    apt_get(&["update"])
}

/// Why a package is not on offer after an update with these warnings: apt has old lists or none of a source that it
/// could not reach.
fn why_not_on_offer(warnings: &str) -> String {
    match known_advice(warnings) {
        Some(what) => what.into(),
        None => format!("{} does not offer it; Debian 12 and 13 do", release_name()),
    }
}

/// Refreshes lists that are not the machine's. All of their sources are needed.
pub(crate) fn update_own(lists: &Lists) -> Result<()> {
    let mut command = lists.command("apt-get");
    command.args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"]);
    run_apt(command, "reading the lists of Debian's packages").map(drop)
}

fn install(packages: &[&str], suite: Option<&str>) -> Result<()> {
    let mut args = vec!["install", "--no-install-recommends"];
    if let Some(suite) = suite {
        args.extend(["-t", suite]);
    }
    args.extend(packages);
    apt_get(&args).map(drop)
}

/// Package lists: those of the machine, or others that apt finds with more options.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lists {
    pub(crate) options: Vec<String>,
}

impl Lists {
    /// Lists kept in `dir`; only its `sources.list` is used.
    pub(crate) fn in_folder(dir: &Path) -> Self {
        let dir = dir.display();
        Self {
            options: vec![
                format!("Dir::Etc::SourceList={dir}/sources.list"),
                "Dir::Etc::SourceParts=/dev/null".into(),
                format!("Dir::State::Lists={dir}/lists"),
                format!("Dir::Cache={dir}"),
                // Otherwise the user to whom apt drops privileges would have to own the folder.
                "APT::Sandbox::User=".into(),
                "Acquire::Languages=none".into(),
                "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            ],
        }
    }

    /// apt-get or apt-cache with these lists.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LC_ALL", "C");
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }

    /// The newest version of a package, regardless of apt's preferences.
    pub(crate) fn newest(&self, package: &str) -> Result<Offer> {
        self.shown(&["--all-versions", package])
            .into_iter()
            .max_by_key(|offer| numbers(&offer.version))
            .with_context(|| format!("no package {package} in these lists"))
    }

    /// The version that apt would install. Without the option, `apt-cache show` lists the newest version first, even if
    /// its suite is used only on request, such as the backports.
    fn candidate(&self, package: &str) -> Option<Offer> {
        self.shown(&["--no-all-versions", package])
            .into_iter()
            .next()
    }

    /// The output of `apt-cache show` with these arguments.
    fn shown(&self, arguments: &[&str]) -> Vec<Offer> {
        let output = self
            .command("apt-cache")
            .arg("show")
            .args(arguments)
            .stderr(Stdio::null())
            .output();
        let text = output
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default();
        text.split("\n\n")
            .filter_map(|stanza| parse_offer(stanza, self))
            .collect()
    }
}

/// The upstream part of a version by its numbers.
fn numbers(version: &str) -> Vec<u64> {
    let upstream = version.split('-').next().unwrap_or(version);
    upstream
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|digits| digits.parse().ok())
        .collect()
}

/// A package as the archive offers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Offer {
    /// The source of the package and its dependencies.
    pub(crate) lists: Lists,
    pub(crate) package: String,
    pub(crate) version: String,
    pub(crate) download_bytes: u64,
    pub(crate) unpacked_bytes: u64,
    depends: Vec<String>,
}

impl Offer {
    /// The first dependency whose name starts with `prefix`: the package behind a meta-package.
    pub(crate) fn dependency(&self, prefix: &str) -> Option<&str> {
        self.depends
            .iter()
            .map(String::as_str)
            .find(|name| name.starts_with(prefix))
    }

    /// Downloads the package into `dir`, where an earlier download may have left a part of it.
    pub(crate) fn download(&self, dir: &Path) -> Result<PathBuf> {
        disk::require(
            dir,
            self.download_bytes,
            &format!("downloading {}", self.package),
        )?;
        let wanted = format!("{}={}", self.package, self.version);
        let mut command = self.lists.command("apt-get");
        command
            // The folder may be in a home directory that apt's own user cannot enter.
            .args(["-qq", "-o", "APT::Sandbox::User=root", "download", &wanted])
            .current_dir(dir);
        run_apt(command, &format!("downloading {wanted}"))?;
        let found = fs::read_dir(dir)
            .with_context(|| format!("reading {}", dir.display()))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
        found.with_context(|| format!("apt-get downloaded no {wanted}"))
    }
}

/// The archive's offer for the first available of these names; the package lists are refreshed if they have none.
pub(crate) fn offer(packages: &[&str]) -> Result<Offer> {
    let lists = Lists::default();
    let known = || packages.iter().find_map(|package| lists.candidate(package));
    if let Some(offer) = known() {
        return Ok(offer);
    }
    let said = update()?;
    known().with_context(|| {
        format!(
            "apt offers no {}: {}",
            packages.join(" or "),
            why_not_on_offer(&said)
        )
    })
}

/// As [`offer`], from lists that are refreshed first.
pub(crate) fn fresh_offer(packages: &[&str]) -> Result<Offer> {
    update()?;
    offer(packages)
}

fn parse_offer(text: &str, lists: &Lists) -> Option<Offer> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            .map(str::trim)
    };
    let number = |name| field(name).and_then(|value| value.parse::<u64>().ok());
    Some(Offer {
        lists: lists.clone(),
        package: field("Package")?.into(),
        version: field("Version")?.into(),
        download_bytes: number("Size")?,
        unpacked_bytes: number("Installed-Size").unwrap_or(0) * 1024,
        depends: field("Depends")
            .unwrap_or_default()
            .split(',')
            .filter_map(|one| one.split_whitespace().next())
            .map(str::to_string)
            .collect(),
    })
}

/// Name of the release, for messages.
fn release_name() -> String {
    fs::read_to_string("/etc/os-release")
        .ok()
        .and_then(|text| {
            text.lines()
                .find_map(|line| line.strip_prefix("PRETTY_NAME="))
                .map(|name| name.trim_matches('"').to_string())
        })
        .unwrap_or_else(|| "this system".into())
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
    Ok(format!("{}-backports", release_codename()?))
}

/// For example `bookworm`.
pub(crate) fn release_codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .with_context(|| {
            format!(
                "{} has no release name: packages can be installed on Debian only",
                release_name()
            )
        })?;
    Ok(codename.trim_matches('"').to_string())
}

/// Adds the backports suite from the archive that already serves the machine's release.
fn add_backports(suite: &str) -> Result<()> {
    let release = suite.trim_end_matches("-backports");
    let line = archive(release)?.line(suite);
    let path = format!("/etc/apt/sources.list.d/{suite}.list");
    note(&format!(
        "Adding {path}: the {suite} suite of the archive this machine uses already"
    ));
    let status = as_root("sh", "adding an apt source")?
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
    Ok(archive(&release_codename()?)?.line(suite))
}

/// The archive from which this machine gets `release`.
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

/// An archive, with the fields needed to name another suite of it.
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
        // A key may be in the file itself, which a one-line source cannot express; apt then uses the keys that it
        // trusts anyway.
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
    fn offer_of_a_meta_package_names_what_it_stands_for() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                    Installed-Size: 13\nDepends: linux-base, linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n\
                    Size: 1504\nDescription: Linux\n long text\n";
        let offer = parse_offer(text, &Lists::default()).unwrap();
        assert_eq!(
            offer.dependency("linux-image-"),
            Some("linux-image-6.1.0-56-cloud-amd64")
        );
        assert_eq!(
            (offer.download_bytes, offer.unpacked_bytes),
            (1504, 13 << 10)
        );
        assert_eq!(parse_offer("", &Lists::default()), None);
    }

    #[test]
    fn version_on_offer_is_the_one_that_apt_would_install() {
        if Command::new("apt-get").arg("--version").output().is_err() {
            test_skip::skip("there is no apt");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        fs::create_dir_all(dir.join("lists/partial")).unwrap();
        let mut sources = String::new();
        // As in backports: newer, and used only on request.
        for (suite, version, release) in [
            ("release", "6.1.192-2", "Suite: release\n"),
            (
                "backports",
                "6.12.95-1~bpo12+1",
                "Suite: backports\nNotAutomatic: yes\nButAutomaticUpgrades: yes\n",
            ),
        ] {
            let place = dir.join(suite);
            fs::create_dir(&place).unwrap();
            fs::write(place.join("Release"), release).unwrap();
            let package = format!(
                "Package: linux-image\nVersion: {version}\nArchitecture: all\nSize: 1\n\
                 SHA256: {:064}\nFilename: ./linux-image.deb\n\n",
                0
            );
            fs::write(place.join("Packages"), package).unwrap();
            sources.push_str(&format!("deb [trusted=yes] file:{} ./\n", place.display()));
        }
        fs::write(dir.join("sources.list"), sources).unwrap();
        let lists = Lists::in_folder(dir);
        let update = lists
            .command("apt-get")
            .args(["-qq", "update"])
            .output()
            .unwrap();
        assert!(
            update.status.success(),
            "{}",
            String::from_utf8_lossy(&update.stderr)
        );
        assert_eq!(lists.candidate("linux-image").unwrap().version, "6.1.192-2");
        assert_eq!(
            lists.newest("linux-image").unwrap().version,
            "6.12.95-1~bpo12+1"
        );
        assert_eq!(lists.candidate("linux"), None);
    }

    #[test]
    fn newest_version_is_by_number_and_not_by_letter() {
        assert!(numbers("6.12.95-1~bpo12+1") < numbers("6.12.117-1"));
        assert!(numbers("7.2.13-1") < numbers("7.3.4-1~bpo13+1"));
    }

    #[test]
    fn failure_of_apt_is_answered_with_what_to_do() {
        for (said, word) in [
            (
                "Err:1 http://a InRelease\n  Could not resolve 'a'\nE: Failed to fetch http://a",
                "network",
            ),
            (
                "E: You don't have enough free space in /var/cache/apt/archives/.",
                "disk",
            ),
            (
                "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 1",
                "another apt",
            ),
            ("E: Unable to locate package linux-x", "Debian 12 and 13"),
            ("E: Failed to fetch http://a  Hash Sum mismatch", "damaged"),
            (
                "E: dpkg was interrupted, you must manually run",
                "dpkg --configure",
            ),
            ("E: something else", "messages above"),
        ] {
            assert!(advice(said).contains(word), "{said}: {}", advice(said));
        }
    }

    #[test]
    fn package_that_is_not_on_offer_is_missing_for_want_of_a_network_or_in_the_release() {
        // apt-get update succeeds without a network.
        let warnings = "W: Failed to fetch http://a/InRelease  Temporary failure resolving 'a'\n\
                        W: Some index files failed to download.";
        assert!(why_not_on_offer(warnings).contains("check the network"));
        let why = why_not_on_offer("W: Target Packages is configured multiple times");
        assert!(why.contains("Debian 12 and 13 do"), "{why}");
    }

    #[test]
    fn missing_apt_and_missing_root_are_named_with_the_task() {
        let mut absent = Command::new("env");
        absent.args(["LC_ALL=C", "/nonexistent/apt-get"]);
        for command in [absent, Command::new("/nonexistent/apt-get")] {
            let error = format!("{:#}", run_apt(command, "apt-get update").unwrap_err());
            assert!(error.contains("only on Debian"), "{error}");
        }
        let error = through_sudo("/nonexistent/sudo", "env", "apt-get update").unwrap_err();
        assert!(
            error.to_string().starts_with("apt-get update needs root: "),
            "{error}"
        );
        // A sudo that asks for a password, and one that does not.
        assert!(through_sudo("false", "env", "apt-get update").is_err());
        let command = through_sudo("true", "env", "apt-get update").unwrap();
        assert_eq!(
            (command.get_program(), command.get_args().next()),
            ("true".as_ref(), Some("env".as_ref()))
        );
    }

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
