//! The format of a disk's image.

use api::config::{DiskConfig, ImageType};
use virtio_devices::block::ImageFormat;

/// The format that the configuration names.
pub fn image_format(disk: &DiskConfig) -> Option<ImageFormat> {
    match disk.image_type? {
        ImageType::FlatVmdk => Some(ImageFormat::Vmdk),
        ImageType::FixedVhd => Some(ImageFormat::Vhd),
        ImageType::Qcow2 => Some(ImageFormat::Qcow2),
        ImageType::Raw => Some(ImageFormat::Raw),
        ImageType::Vhdx => Some(ImageFormat::Vhdx),
        ImageType::Unknown => None,
    }
}
