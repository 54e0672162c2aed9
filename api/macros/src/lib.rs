//! Macros with which the crate `api` declares the sections of the VM configuration. They expand to paths inside that
//! crate and serve no other.

mod section;
mod words;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Declares a section of the configuration, one line a field.
///
/// From the fields and their `#[key(…)]` lines it derives the serde rules of the wire, `JsonSchema` (doc comments become
/// descriptions), and `Default`. With `#[section(option = "disk", about = "Disk parameters")]` it also derives the
/// command line option `--disk`: `parse`, which reads `key=value,key=value`, and `syntax`, which is its help. In tests there
/// is `reference` too, from which `docs/options.md` is generated.
///
/// # Wire
/// An `Option` may be absent and is left out on output while it is `None`. Any other field may be absent too, and then
/// has its default, unless it is `required`. Lists and free-form values are bounded while they are read.
///
/// # Arguments of `#[key(…)]`
/// Only fields that have this line are keys of the option. All arguments may be left out.
///
/// | Argument | Meaning |
/// | --- | --- |
/// | `"<path>"` | what the help shows behind `key=`; otherwise what the type says, as in `on\|off` |
/// | `default = …` | value when it is not given; may use the fields above. That of an `Option` does not hold on the wire |
/// | `fresh` | the default differs each time, so the schema states none |
/// | `required` | must be given on the wire and, without `default`, on the command line |
/// | `omit_false` | left out on output while it is `false` |
/// | `name = "…"` | the key, where it is not the field's name |
/// | `alias = "…"` | an older name, understood on the wire and the command line |
/// | `hidden` | understood, and not in the help |
/// | `since = "…"` | version that first had the key, for `docs/options.md`; the first version when left out |
/// | `read = …` | function that reads the text, where it is not that of the type |
/// | `group = …` | a `KeyGroup`, several keys that make up this field |
///
/// # Arguments of `#[section(…)]`
/// `option` and `about` (begin of the help) come together. `parse = "name"` gives the function another name and makes
/// it private. `unsupported = "key"` names a key that is refused as not supported.
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
