//! Configurations of the small kernel with which the prefixes of the series are checked
//! (`guest-patches/config/check.config`), and the series' own options in each prefix.

use anyhow::Result;
use strum::VariantArray as _;

use super::cache::key;
use super::series::{self, Contents};

/// The series' own options: all on, all off, or on while many related kernel options are off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub(super) enum Variant {
    On,
    Off,
    Mixed,
}

/// Options of the small kernel that the series does not need.
const MIXED: &str = "CONFIG_SMP=n\nCONFIG_NR_CPUS=1\nCONFIG_JUMP_LABEL=n\nCONFIG_SUSPEND=n\n\
                     CONFIG_NUMA=n\nCONFIG_SPARSEMEM_VMEMMAP=n\nCONFIG_MEMORY_HOTPLUG=n\n\
                     CONFIG_MEMORY_HOTREMOVE=n\nCONFIG_VIRTIO_MEM=n\nCONFIG_CMA=n\n\
                     CONFIG_TRANSPARENT_HUGEPAGE=n\nCONFIG_COMPACTION=n\n\
                     CONFIG_BALLOON_COMPACTION=n\nCONFIG_PAGE_POISONING=n\n\
                     CONFIG_VM_EVENT_COUNTERS=n\nCONFIG_DEBUG_FS=n\nCONFIG_FTRACE=n\n\
                     CONFIG_ENABLE_DEFAULT_TRACERS=n\n";

impl Variant {
    pub(super) const ALL: &'static [Self] = Self::VARIANTS;

    /// Its name, also that of its tree of objects.
    pub(super) fn name(self) -> &'static str {
        self.into()
    }

    /// The trackers that a kernel of the whole series can be set to use.
    pub(super) fn trackers(self) -> &'static [&'static str] {
        match self {
            Self::On | Self::Mixed => &["off", "mainline", "bitmap"],
            Self::Off => &["off", "mainline"],
        }
    }
}

/// The options of a variant.
#[derive(Debug, Clone, Copy)]
pub(super) struct Configuration<'a> {
    /// The small kernel's.
    small: &'a str,
    /// The options of the series.
    ours: &'a str,
    variant: Variant,
}

/// The two files from which configurations are composed.
#[derive(Debug)]
pub(super) struct Files {
    small: String,
    ours: String,
}

impl Files {
    pub(super) fn read() -> Result<Self> {
        Ok(Self {
            small: series::config("check")?,
            ours: series::config("patched")?,
        })
    }

    pub(super) fn of(&self, variant: Variant) -> Configuration<'_> {
        Configuration {
            small: &self.small,
            ours: &self.ours,
            variant,
        }
    }
}

impl Configuration<'_> {
    /// A key that depends on all of its content.
    pub(super) fn key(&self) -> String {
        key(&[self.small, self.ours, MIXED, self.variant.name()])
    }

    /// The fragment for a prefix of the series.
    pub(super) fn fragment(&self, contents: &Contents) -> String {
        let ours = self.ours(contents);
        match self.variant {
            Variant::On | Variant::Off => format!("{}\n{ours}", self.small),
            Variant::Mixed => format!("{}\n{ours}{MIXED}", without(self.small, MIXED)),
        }
    }

    /// The series' own options, without those that a prefix does not add yet.
    pub(super) fn ours(&self, contents: &Contents) -> String {
        let known = self.ours.lines().filter(|line| {
            line.split_once('=')
                .is_some_and(|(option, _)| is_declared(option, contents))
        });
        let value = |line: &str| match self.variant {
            Variant::Off => format!("{}\n", line.replace("=y", "=n")),
            Variant::On | Variant::Mixed => format!("{line}\n"),
        };
        known.map(value).collect()
    }
}

/// The lines of `fragment` whose options `other` does not set.
fn without(fragment: &str, other: &str) -> String {
    let option = |line: &str| line.split_once('=').map(|(name, _)| name.to_string());
    let set: Vec<String> = other.lines().filter_map(option).collect();
    fragment
        .lines()
        .filter(|line| option(line).is_none_or(|name| !set.contains(&name)))
        .map(|line| format!("{line}\n"))
        .collect()
}

fn is_kconfig(file: &str) -> bool {
    file.rsplit('/')
        .next()
        .is_some_and(|name| name.starts_with("Kconfig"))
}

fn is_declared(option: &str, contents: &Contents) -> bool {
    let Some(name) = option.strip_prefix("CONFIG_") else {
        return false;
    };
    let declaration = format!("config {name}");
    contents
        .iter()
        .filter(|(file, _)| is_kconfig(file))
        .filter_map(|(_, bytes)| bytes.as_deref())
        .any(|bytes| {
            String::from_utf8_lossy(bytes)
                .lines()
                .any(|line| line == declaration)
        })
}

/// A key that depends on a prefix's files that affect its configuration.
pub(super) fn kconfig_key(contents: &Contents) -> String {
    let texts: Vec<String> = contents
        .iter()
        .filter(|(file, _)| is_kconfig(file))
        .flat_map(|(file, bytes)| {
            let text = String::from_utf8_lossy(bytes.as_deref().unwrap_or_default());
            [file.clone(), text.into_owned()]
        })
        .collect();
    key(&texts.iter().map(String::as_str).collect::<Vec<&str>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "# A comment.\nCONFIG_NEW=y\nCONFIG_LATER=y\n";

    fn fragment(variant: Variant) -> String {
        let text = b"config NEW\n\tbool \"New\"\nconfig LATER_STILL\n";
        let contents = [("mm/Kconfig".to_string(), Some(text.to_vec()))].into();
        let files = Files {
            small: "CONFIG_SMP=y\nCONFIG_A=y\n".into(),
            ours: OURS.into(),
        };
        files.of(variant).fragment(&contents)
    }

    #[test]
    fn fragment_has_the_options_that_the_prefix_brings() {
        assert_eq!(
            fragment(Variant::On),
            "CONFIG_SMP=y\nCONFIG_A=y\n\nCONFIG_NEW=y\n"
        );
        assert_eq!(
            fragment(Variant::Off),
            "CONFIG_SMP=y\nCONFIG_A=y\n\nCONFIG_NEW=n\n"
        );
    }

    #[test]
    fn fragment_of_mixed_says_each_option_once() {
        let text = fragment(Variant::Mixed);
        assert!(
            text.starts_with("CONFIG_A=y\n\nCONFIG_NEW=y\nCONFIG_SMP=n\n"),
            "{text}"
        );
    }
}
