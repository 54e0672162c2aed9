//! Work on an object together with a part of it that comes and goes.

/// Runs `work` on `whole` and on the part in `place`, which is taken out of it meanwhile. Does nothing without a part.
///
/// # Errors
/// Those of `work`; the part is back in its place then, too.
pub(crate) fn with_taken<W, P, E>(
    whole: &mut W,
    place: fn(&mut W) -> &mut Option<P>,
    work: impl FnOnce(&mut W, &mut P) -> Result<(), E>,
) -> Result<(), E> {
    let Some(mut part) = place(whole).take() else {
        return Ok(());
    };
    let done = work(whole, &mut part);
    *place(whole) = Some(part);
    done
}
