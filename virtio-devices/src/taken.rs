//! Temporarily takes an optional part out of an object, to use both mutably.

/// Runs `work` on `whole` and on the part in `place`, which is taken out during the call. Does nothing without a part.
///
/// # Errors
/// The errors of `work`. The part is put back in this case, too.
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
