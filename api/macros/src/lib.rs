//! Macros with which the crate `api` declares the sections of the VM configuration. They expand to paths inside that
//! crate, so no other crate can use them.

mod section;
mod words;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Declares a section of the configuration, one line per field.
///
/// From the fields and their `#[key(…)]` attributes, the macro derives the serde attributes for the wire format,
/// `JsonSchema` (doc comments become descriptions), and `Default`. With `#[section(option = "disk", about = "Disk
/// parameters")]` it also derives the command line option `--disk`: `parse`, which reads `key=value,key=value`, and
/// `syntax`, which returns its help text. In tests it also derives `reference`, from which `docs/options.md` is
/// generated.
///
/// # Wire
/// An `Option` may be absent, and is omitted on output while it is `None`. Any other absent field gets its default,
/// unless it is `required`. Lists and free-form values are bounded while they are read.
///
/// # Arguments of `#[key(…)]`
/// Only fields with this attribute are keys of the option. All arguments are optional.
///
/// | Argument | Meaning |
/// | --- | --- |
/// | `"<path>"` | text after `key=` in the help; by default that of the type, such as `on\|off` |
/// | `default = …` | value if the key is absent; may use the fields above. For an `Option`, only on the command line |
/// | `fresh` | the default is generated each time, so the schema contains none |
/// | `required` | must be present on the wire and, without `default`, on the command line |
/// | `omit_false` | omitted on output while it is `false` |
/// | `name = "…"` | the key, if it differs from the field's name |
/// | `alias = "…"` | an older name, accepted on the wire and the command line |
/// | `hidden` | accepted, but not in the help |
/// | `read = …` | function that reads the text, if not the type's own |
/// | `group = …` | a `KeyGroup`: several keys that form this field |
///
/// # Arguments of `#[section(…)]`
/// `option` and `about` (the start of the help) must be given together. `parse = "name"` renames the function and makes
/// it private. `unsupported = "key"` names a key that is rejected as unsupported.
#[proc_macro_attribute]
pub fn section(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let arguments = parse_macro_input!(arguments as section::Arguments);
    let item = parse_macro_input!(item as DeriveInput);
    section::expand(arguments, item)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Derives the command line words of an enumeration from `#[word("…")]` on its variants. A variant without it has none.
#[proc_macro_derive(Words, attributes(word))]
pub fn words(item: TokenStream) -> TokenStream {
    let item = parse_macro_input!(item as DeriveInput);
    words::expand(&item)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
