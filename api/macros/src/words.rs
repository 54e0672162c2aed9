//! Implements `#[derive(Words)]`.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Error, LitStr};

pub(crate) fn expand(item: &DeriveInput) -> syn::Result<TokenStream> {
    let Data::Enum(data) = &item.data else {
        return Err(Error::new_spanned(item, "only an enumeration has words"));
    };
    let mut pairs = Vec::new();
    for variant in &data.variants {
        let name = &variant.ident;
        for attribute in variant.attrs.iter().filter(|it| it.path().is_ident("word")) {
            let word: LitStr = attribute.parse_args()?;
            pairs.push(quote!((#word, Self::#name)));
        }
    }
    let name = &item.ident;
    Ok(quote! {
        impl crate::options::Words for #name {
            const WORDS: &'static [(&'static str, Self)] = &[#(#pairs),*];
        }
    })
}
