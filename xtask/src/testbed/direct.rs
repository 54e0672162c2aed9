//! stub
use super::{Job, Outcome};
use anyhow::Result;
#[derive(Debug, clap::Args)]
pub(crate) struct Inside {}
pub(crate) fn run(_job: &Job) -> Result<Outcome> {
    anyhow::bail!("stub")
}
pub(crate) fn inside(_i: &Inside) -> Result<u8> {
    anyhow::bail!("stub")
}
