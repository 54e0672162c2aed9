//! Ranges of a disk image that the VMM locks against other users.

use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

/// How a disk image is locked against other users.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, IntoStaticStr, VariantArray,
)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[strum(serialize_all = "kebab-case", const_into_str)]
pub enum LockGranularity {
    /// Lock the bytes that exist when the image is opened.
    #[default]
    ByteRange,
    /// Lock the whole file, growth included.
    Full,
}

impl LockGranularity {
    /// Each variant with its name on the command line.
    pub const WORDS: [(&'static str, Self); 2] = [
        (Self::ByteRange.into_str(), Self::ByteRange),
        (Self::Full.into_str(), Self::Full),
    ];
}

// Each variant has a name.
const _: () = assert!(LockGranularity::WORDS.len() == LockGranularity::VARIANTS.len());
