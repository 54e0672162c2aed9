//! The plan of measurements: the command line's arguments, and the resulting combinations.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use integration_tests::MIB;
use strum::VariantArray as _;

const KIB: u64 = 1 << 10;
const PAGE_BYTES: u64 = 4096;
/// Smallest block that Linux reports by default (pageblock order 9).
const REPORTED_BYTES_MIN: u64 = 2 * MIB;
/// Maximum block: in guest memory of 1 GiB, two larger ones do not fit.
const BLOCK_BYTES_MAX: u64 = 256 * MIB;
const ROUNDS_DEFAULT: usize = 3;
const ROUNDS_MAX: usize = 1000;

const USAGE: &str = "options of reclaim, each with one value or several with commas between them:
  --way reporting|hinting|inflate|unplug
  --tracker mainline|bitmap            of reporting; bitmap needs the patched kernel
  --backing private|thp|memfd|hugetlb  of the guest's memory
  --block 64K|2M|4M|32M|…|all          what the guest frees at a time
  --rounds N";

/// Backing of the guest's memory on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Backing {
    /// Private, in pages of 4 KiB.
    Private,
    /// Private, in transparent huge pages if the host supports them.
    Thp,
    /// Shared memory of a memfd.
    Memfd,
    /// Huge pages of the pool, 2 MiB.
    Hugetlb,
}

impl Backing {
    pub(super) fn word(self) -> &'static str {
        self.into()
    }

    /// The value of `--memory`.
    pub(super) fn memory(self) -> &'static str {
        match self {
            Self::Private => "size=1G,thp=off",
            Self::Thp => "size=1G,thp=on",
            Self::Memfd => "size=1G,shared=on",
            Self::Hugetlb => "size=1G,hugepages=on",
        }
    }
}

/// Path by which memory returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The guest reports memory found by mainline's tracker.
    Mainline,
    /// The guest reports memory found by the bitmap tracker.
    Bitmap,
    /// The host starts a run of free page hinting.
    Hinting,
    /// The host sets the balloon's size to the freed amount.
    Inflate,
    /// The host unplugs as much RAM as was freed (virtio-mem).
    Unplug,
}

impl Way {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Mainline | Self::Bitmap => "reporting",
            Self::Hinting => "hinting",
            Self::Inflate => "inflate",
            Self::Unplug => "unplug",
        }
    }

    pub(super) fn tracker(self) -> Option<&'static str> {
        match self {
            Self::Mainline => Some("mainline"),
            Self::Bitmap => Some("bitmap"),
            Self::Hinting | Self::Inflate | Self::Unplug => None,
        }
    }
}

/// Memory that one free returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Block {
    /// Blocks of this many bytes, whose neighbours stay in use.
    Bytes(u64),
    /// One range as large as it can be.
    All,
}

impl Block {
    /// The block order that the guest must be configured to report, if its default is too large.
    pub(super) fn order(self) -> Option<u32> {
        match self {
            Self::Bytes(bytes) if bytes < REPORTED_BYTES_MIN => Some((bytes / PAGE_BYTES).ilog2()),
            Self::Bytes(_) | Self::All => None,
        }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) if bytes % MIB == 0 => write!(f, "{}M", bytes / MIB),
            Self::Bytes(bytes) => write!(f, "{}K", bytes / KIB),
            Self::All => f.write_str("all"),
        }
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Combination {
    pub(super) way: Way,
    pub(super) backing: Backing,
    pub(super) block: Block,
}

impl Combination {
    /// The value of `--memory`: 1 GiB, most of which can be unplugged if the host has to unplug it.
    pub(super) fn memory(&self) -> String {
        let memory = self.backing.memory();
        match self.way {
            Way::Unplug => {
                let parts =
                    "size=256M,hotplug_method=virtio-mem,hotplug_size=768M,hotplugged_size=768M";
                memory.replace("size=1G", parts)
            }
            _ => memory.to_owned(),
        }
    }

    /// Whether both can use the same guest.
    pub(super) fn shares_guest(&self, other: &Self) -> bool {
        (self.way, self.backing, self.block.order())
            == (other.way, other.backing, other.block.order())
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tracker = self.way.tracker().unwrap_or("–");
        let (way, backing) = (self.way.word(), self.backing.word());
        write!(f, "{way:<9} {tracker:<8} {backing:<7} {:>4}", self.block)
    }
}

/// All measurements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) combinations: Vec<Combination>,
    pub(super) rounds: usize,
}

impl Plan {
    /// A single free, to check that it works.
    pub(super) fn short() -> Self {
        let combinations = vec![Combination {
            way: Way::Mainline,
            backing: Backing::Thp,
            block: Block::Bytes(2 * MIB),
        }];
        Self {
            combinations,
            rounds: 1,
        }
    }

    /// Varies one parameter at a time; the others have a VM's defaults.
    fn full(patched: bool) -> Vec<Combination> {
        let base = Block::Bytes(2 * MIB);
        let mut all = Vec::new();
        let reporting = [Way::Mainline, Way::Bitmap];
        for way in reporting
            .iter()
            .filter(|way| patched || **way != Way::Bitmap)
        {
            let mut add = |backing, block| {
                all.push(Combination {
                    way: *way,
                    backing,
                    block,
                });
            };
            // Parts of a transparent huge page are freed only with the whole page, so small blocks are measured without
            // them.
            add(Backing::Private, Block::Bytes(64 * KIB));
            add(Backing::Private, base);
            add(Backing::Thp, base);
            add(Backing::Thp, Block::Bytes(32 * MIB));
            add(Backing::Thp, Block::All);
            add(Backing::Memfd, base);
            add(Backing::Hugetlb, base);
        }
        all.extend(
            [Way::Hinting, Way::Inflate, Way::Unplug].map(|way| Combination {
                way,
                backing: Backing::Thp,
                block: base,
            }),
        );
        all
    }

    /// Reads the command line; `patched` is whether the guests boot the patched kernel.
    pub(super) fn parse(words: &[String], patched: bool) -> Result<Self> {
        let mut named = Named::default();
        let mut rounds = ROUNDS_DEFAULT;
        for pair in words.chunks(2) {
            let [option, value] = pair else {
                bail!("{} needs a value\n{USAGE}", pair[0]);
            };
            let bad = || format!("{option} {value}\n{USAGE}");
            for value in value.split(',') {
                match option.as_str() {
                    "--way" => named.ways.push(way(value).with_context(bad)?),
                    "--tracker" => named.trackers.push(tracker(value).with_context(bad)?),
                    "--backing" => named.backings.push(backing(value).with_context(bad)?),
                    "--block" => named.blocks.push(block(value).with_context(bad)?),
                    "--rounds" => rounds = self::rounds(value).with_context(bad)?,
                    _ => bail!("reclaim has no option {option}\n{USAGE}"),
                }
            }
        }
        let combinations = if named == Named::default() {
            Self::full(patched)
        } else {
            named.combinations()?
        };
        ensure!(
            patched || combinations.iter().all(|row| row.way != Way::Bitmap),
            "the bitmap tracker needs the patched kernel: cargo xtask bench --kernel patched reclaim …"
        );
        Ok(Self {
            combinations,
            rounds,
        })
    }
}

/// The parameters on the command line.
#[derive(Debug, Default, PartialEq, Eq)]
struct Named {
    ways: Vec<&'static str>,
    trackers: Vec<Way>,
    backings: Vec<Backing>,
    blocks: Vec<Block>,
}

impl Named {
    /// All combinations of the named parameters; the others have a VM's defaults.
    fn combinations(mut self) -> Result<Vec<Combination>> {
        if self.ways.is_empty() {
            self.ways.push("reporting");
        }
        let reporting = self.ways.contains(&"reporting");
        ensure!(
            reporting || self.trackers.is_empty(),
            "--tracker is for --way reporting\n{USAGE}"
        );
        if self.trackers.is_empty() {
            self.trackers.push(Way::Mainline);
        }
        if self.backings.is_empty() {
            self.backings.push(Backing::Thp);
        }
        if self.blocks.is_empty() {
            self.blocks.push(Block::Bytes(2 * MIB));
        }
        let mut ways = Vec::new();
        for way in self.ways {
            match way {
                "hinting" => ways.push(Way::Hinting),
                "inflate" => ways.push(Way::Inflate),
                "unplug" => ways.push(Way::Unplug),
                _ => ways.extend(&self.trackers),
            }
        }
        let mut all: Vec<Combination> = Vec::new();
        for way in ways {
            for backing in &self.backings {
                for block in &self.blocks {
                    let (backing, block) = (*backing, *block);
                    all.push(Combination {
                        way,
                        backing,
                        block,
                    });
                }
            }
        }
        Ok(all)
    }
}

fn way(word: &str) -> Result<&'static str> {
    let words = ["reporting", "hinting", "inflate", "unplug"];
    let known = words.into_iter().find(|known| *known == word);
    known.context("there is no such way")
}

fn tracker(word: &str) -> Result<Way> {
    match word {
        "mainline" => Ok(Way::Mainline),
        "bitmap" => Ok(Way::Bitmap),
        _ => bail!("there is no such tracker"),
    }
}

fn backing(word: &str) -> Result<Backing> {
    let known = Backing::VARIANTS
        .iter()
        .copied()
        .find(|known| known.word() == word);
    known.context("there is no such backing")
}

fn block(word: &str) -> Result<Block> {
    if word == "all" {
        return Ok(Block::All);
    }
    let bytes = api::options::parse_bytes(word)?;
    ensure!(
        bytes.is_power_of_two() && (PAGE_BYTES..=BLOCK_BYTES_MAX).contains(&bytes),
        "blocks are powers of two from 4K to {}M",
        BLOCK_BYTES_MAX / MIB
    );
    Ok(Block::Bytes(bytes))
}

fn rounds(word: &str) -> Result<usize> {
    let rounds = word.parse().context("not a number")?;
    ensure!(
        (1..=ROUNDS_MAX).contains(&rounds),
        "rounds are 1 to {ROUNDS_MAX}"
    );
    Ok(rounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str, patched: bool) -> Result<Plan> {
        let words: Vec<String> = line.split_ascii_whitespace().map(String::from).collect();
        Plan::parse(&words, patched)
    }

    fn rows(line: &str) -> Vec<String> {
        let plan = parse(line, true).unwrap();
        let one = |row: &Combination| {
            let text = row.to_string();
            text.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        plan.combinations.iter().map(one).collect()
    }

    #[test]
    fn plan_with_nothing_named_varies_one_thing_at_a_time() {
        let plan = parse("--rounds 5", true).unwrap();
        assert_eq!((plan.combinations.len(), plan.rounds), (17, 5));
        let stock = parse("", false).unwrap();
        assert_eq!((stock.combinations.len(), stock.rounds), (10, 3));
        assert!(stock.combinations.iter().all(|row| row.way != Way::Bitmap));
    }

    #[test]
    fn plan_combines_everything_named() {
        assert_eq!(
            rows("--way reporting,hinting --tracker bitmap --backing thp,memfd --block 64K,all"),
            [
                "reporting bitmap thp 64K",
                "reporting bitmap thp all",
                "reporting bitmap memfd 64K",
                "reporting bitmap memfd all",
                "hinting – thp 64K",
                "hinting – thp all",
                "hinting – memfd 64K",
                "hinting – memfd all",
            ]
        );
        assert_eq!(
            rows("--block 4M --block 32M"),
            ["reporting mainline thp 4M", "reporting mainline thp 32M"]
        );
    }

    #[test]
    fn plan_with_wrong_words_tells_usage() {
        for line in [
            "--jump 1",
            "--block",
            "--block 3M",
            "--block 1K",
            "--block 512M",
            "--block 9999999999999999999M",
            "--backing paper",
            "--way out",
            "--tracker none",
            "--rounds 0",
            "--rounds many",
            "--way hinting --tracker mainline",
        ] {
            let error = format!("{:#}", parse(line, true).unwrap_err());
            assert!(
                error.contains("--tracker mainline|bitmap"),
                "{line}: {error}"
            );
        }
        let error = parse("--tracker bitmap", false).unwrap_err().to_string();
        assert!(error.contains("--kernel patched"), "{error}");
    }

    #[test]
    fn guest_is_shared_by_blocks_that_need_no_other_order() {
        let row = |block| Combination {
            way: Way::Bitmap,
            backing: Backing::Thp,
            block,
        };
        let base = row(Block::Bytes(2 * MIB));
        assert!(base.shares_guest(&row(Block::All)));
        assert!(!base.shares_guest(&row(Block::Bytes(64 * KIB))));
        assert_eq!(Block::Bytes(64 * KIB).order(), Some(4));
    }
}
