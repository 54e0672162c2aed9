//! stub
pub(crate) fn kvm_boots_linux() -> anyhow::Result<bool> {
    Ok(false)
}
