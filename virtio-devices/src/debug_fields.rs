//! `Debug` for types with fields that do not implement it.

/// Implements `Debug` for types of which only the named fields can or should be shown. `Type(it) { name: value }` shows
/// computed values.
#[macro_export]
macro_rules! debug_fields {
    ($($name:ident { $($field:ident),* })+) => {
        $(impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($name))
                    $(.field(stringify!($field), &self.$field))*
                    .finish_non_exhaustive()
            }
        })+
    };
    ($name:ident($this:ident) { $($field:ident: $value:expr),+ }) => {
        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                let $this = self;
                f.debug_struct(stringify!($name))
                    $(.field(stringify!($field), &$value))+
                    .finish_non_exhaustive()
            }
        }
    };
}
