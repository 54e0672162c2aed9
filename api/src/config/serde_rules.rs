//! Small rules shared by the configuration types: what is left out on output, and defaults that are not the type's own.

pub(super) fn is_false(value: &bool) -> bool {
    !*value
}

pub(super) fn enabled() -> bool {
    true
}
