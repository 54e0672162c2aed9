//! Implements `#[section]`.

use proc_macro2::TokenStream;
use quote::{ToTokens, format_ident, quote};
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{
    Attribute, Data, DeriveInput, Error, Expr, Field, GenericArgument, Ident, LitStr,
    PathArguments, Token, Type, parse_quote,
};

/// The arguments of an attribute.
pub(crate) struct Arguments(Punctuated<Argument, Token![,]>);

enum Argument {
    Text(LitStr),
    Switch(Ident),
    Value(Ident, Expr),
}

impl Parse for Arguments {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        Punctuated::parse_terminated(input).map(Self)
    }
}

impl Parse for Argument {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        if input.peek(LitStr) {
            return input.parse().map(Self::Text);
        }
        let name = input.parse()?;
        if input.parse::<Option<Token![=]>>()?.is_some() {
            return Ok(Self::Value(name, input.parse()?));
        }
        Ok(Self::Switch(name))
    }
}

/// The option of a section.
struct CommandLine {
    option: LitStr,
    about: LitStr,
    /// Name of the parsing function, if it is not the public `parse`.
    parse: Option<LitStr>,
    unsupported: Option<LitStr>,
}

impl CommandLine {
    fn of(arguments: Arguments) -> syn::Result<Option<Self>> {
        let (mut option, mut about, mut parse, mut unsupported) = (None, None, None, None);
        for argument in arguments.0 {
            match argument {
                Argument::Value(name, value) if name == "option" => option = Some(text(value)?),
                Argument::Value(name, value) if name == "about" => about = Some(text(value)?),
                Argument::Value(name, value) if name == "parse" => parse = Some(text(value)?),
                Argument::Value(name, value) if name == "unsupported" => {
                    unsupported = Some(text(value)?);
                }
                other => return Err(other.unknown()),
            }
        }
        Ok(option.zip(about).map(|(option, about)| Self {
            option,
            about,
            parse,
            unsupported,
        }))
    }
}

fn text(value: Expr) -> syn::Result<LitStr> {
    syn::parse2(value.into_token_stream())
}

impl Argument {
    fn unknown(&self) -> Error {
        match self {
            Self::Text(text) => Error::new_spanned(text, "no text is expected here"),
            Self::Switch(name) | Self::Value(name, _) => {
                Error::new_spanned(name, "unknown argument")
            }
        }
    }
}

/// A field with the arguments of its `#[key(…)]`.
struct Rule {
    field: Ident,
    kind: Type,
    is_key: bool,
    is_flattened: bool,
    /// It has a custom deserializer.
    has_reader: bool,
    /// The field's documentation, as one line.
    doc: String,
    help: Option<LitStr>,
    name: Option<LitStr>,
    alias: Option<LitStr>,
    default: Option<Expr>,
    read: Option<Expr>,
    group: Option<Expr>,
    required: bool,
    fresh: bool,
    omit_false: bool,
    hidden: bool,
}

impl Rule {
    /// Reads the rule of `field` and removes its attribute.
    fn take(field: &mut Field) -> syn::Result<Self> {
        let name = field.ident.clone();
        let mut rule = Self {
            field: name.ok_or_else(|| Error::new_spanned(&*field, "fields need names"))?,
            kind: field.ty.clone(),
            is_key: false,
            is_flattened: field.attrs.iter().any(is_flatten),
            has_reader: field.attrs.iter().any(has_reader),
            doc: doc_text(&field.attrs),
            help: None,
            name: None,
            alias: None,
            default: None,
            read: None,
            group: None,
            required: false,
            fresh: false,
            omit_false: false,
            hidden: false,
        };
        let (keys, others) = std::mem::take(&mut field.attrs)
            .into_iter()
            .partition::<Vec<_>, _>(|attribute| attribute.path().is_ident("key"));
        field.attrs = others;
        for attribute in keys {
            rule.is_key = true;
            if let syn::Meta::List(_) = &attribute.meta {
                rule.fill(attribute.parse_args()?)?;
            }
        }
        Ok(rule)
    }

    fn fill(&mut self, arguments: Arguments) -> syn::Result<()> {
        for argument in arguments.0 {
            match argument {
                Argument::Text(text) => self.help = Some(text),
                Argument::Switch(name) if name == "required" => self.required = true,
                Argument::Switch(name) if name == "fresh" => self.fresh = true,
                Argument::Switch(name) if name == "omit_false" => self.omit_false = true,
                Argument::Switch(name) if name == "hidden" => self.hidden = true,
                Argument::Value(name, value) if name == "name" => self.name = Some(text(value)?),
                Argument::Value(name, value) if name == "alias" => self.alias = Some(text(value)?),
                Argument::Value(name, value) if name == "default" => self.default = Some(value),
                Argument::Value(name, value) if name == "read" => self.read = Some(value),
                Argument::Value(name, value) if name == "group" => self.group = Some(value),
                other => return Err(other.unknown()),
            }
        }
        Ok(())
    }

    fn is_optional(&self) -> bool {
        outer(&self.kind).is_some_and(|(outer, _)| outer == "Option")
    }

    /// The deserializer of a field that must be bounded.
    fn reader(&self) -> Option<&'static str> {
        if self.has_reader {
            return None;
        }
        let (outermost, inner) = outer(&self.kind)?;
        let second = inner.and_then(outer).map(|(second, _)| second.to_string());
        match (outermost.to_string().as_str(), second.as_deref()) {
            ("Vec", _) => Some("crate::bounded::list"),
            ("Option", Some("Vec")) => Some("crate::bounded::optional_list"),
            ("Option", Some("Value")) => Some("crate::bounded::section"),
            _ => None,
        }
    }

    fn key(&self) -> String {
        self.name
            .as_ref()
            .map_or_else(|| self.field.to_string(), LitStr::value)
    }

    fn default_value(&self) -> TokenStream {
        match &self.default {
            Some(value) => value.to_token_stream(),
            None => quote!(::std::default::Default::default()),
        }
    }

    /// The function that serde calls for an absent field, if the type's own default is not the right one.
    fn default_function(&self) -> Option<(Ident, TokenStream)> {
        let value = self.default.as_ref()?;
        if self.required || self.is_optional() {
            return None;
        }
        let (name, kind) = (format_ident!("default_{}", self.field), &self.kind);
        let function = quote!(fn #name() -> #kind { #value });
        Some((name, function))
    }

    /// The serde and schema attributes of the field.
    fn attributes(&self, section: &Ident) -> Vec<Attribute> {
        let mut attributes = Vec::new();
        if !self.required && !self.is_flattened {
            attributes.push(match self.default_function() {
                Some((function, _)) => {
                    let path = format!("{section}::{function}");
                    parse_quote!(#[serde(default = #path)])
                }
                None => parse_quote!(#[serde(default)]),
            });
        }
        if self.is_optional() {
            attributes.push(parse_quote!(#[serde(skip_serializing_if = "Option::is_none")]));
        }
        if let Some(reader) = self.reader() {
            attributes.push(parse_quote!(#[serde(deserialize_with = #reader)]));
        }
        if self.omit_false {
            attributes.push(parse_quote!(#[serde(skip_serializing_if = "::std::ops::Not::not")]));
            attributes.push(parse_quote!(#[schemars(extend("default" = false))]));
        }
        if self.fresh {
            attributes.push(parse_quote!(#[schemars(extend("default" = null))]));
        }
        if let Some(alias) = &self.alias {
            attributes.push(parse_quote!(#[serde(alias = #alias)]));
        }
        attributes
    }

    /// The call that adds the key to `keys`.
    fn declaration(&self) -> TokenStream {
        let (key, kind) = (self.key(), &self.kind);
        let shown = match (&self.group, &self.help) {
            (Some(group), _) => quote!(crate::options::KeyGroup::declare(&#group, &mut keys);),
            _ if self.hidden => quote!(keys.hidden(#key);),
            (None, Some(help)) => quote!(keys.shown(#key, #help);),
            (None, None) => {
                quote!(keys.shown(#key, &<#kind as crate::options::OptionValue>::values());)
            }
        };
        let alias = self.alias.iter();
        quote!(#shown #(keys.hidden(#alias);)*)
    }

    /// The key's entry on the page of all options.
    fn reference(&self, rules: &[Self]) -> TokenStream {
        let (declaration, doc, field) = (self.declaration(), &self.doc, self.field.to_string());
        let meaning = match &self.group {
            Some(group) => quote!(|key| crate::options::KeyGroup::meaning(&#group, key)),
            None => quote!(|_| None),
        };
        let is_size =
            matches!(&self.read, Some(Expr::Path(read)) if read.path.is_ident("parse_bytes"));
        let same_as = rules.iter().find(|other| {
            matches!(&self.default, Some(Expr::Path(value)) if value.path.is_ident(&other.field))
        });
        let default = match same_as {
            Some(other) => {
                let key = other.key();
                quote!(crate::options::KeyDefault::SameAs(#key))
            }
            None if self.fresh => quote!(crate::options::KeyDefault::Generated),
            None if self.required && self.default.is_none() => {
                quote!(crate::options::KeyDefault::Required)
            }
            // Omitted on the wire while it is `false`.
            None if self.omit_false => quote!(crate::options::KeyDefault::Value(false.into())),
            None => quote!(crate::options::KeyDefault::Value(defaults[#field].take())),
        };
        quote! {{
            let mut keys = crate::options::Keys::default();
            #declaration
            crate::options::KeyReference {
                syntax: keys.shown_keys().to_vec(),
                doc: #doc,
                meaning: #meaning,
                default: #default,
                is_size: #is_size,
            }
        }}
    }

    /// The statement that reads the field from `options` into a variable of its name.
    fn reading(&self) -> TokenStream {
        let (field, kind, key, default) =
            (&self.field, &self.kind, self.key(), self.default_value());
        if !self.is_key {
            return quote!(let #field: #kind = #default;);
        }
        if let Some(group) = &self.group {
            return quote!(let #field: #kind = crate::options::KeyGroup::read(&#group, &options)?;);
        }
        let read = |key: &dyn ToTokens| match &self.read {
            Some(function) => quote!(options.read(#key, #function)?.map(<#kind>::from)),
            None => quote!(options.get::<#kind>(#key)?),
        };
        let own = read(&key);
        let older = self.alias.as_ref().map(|alias| {
            let older = read(alias);
            quote!(let given = match given { None => #older, given => given };)
        });
        let otherwise = if self.required && self.default.is_none() {
            quote!(return Err(options.missing(#key)))
        } else {
            default
        };
        quote! {
            let given: Option<#kind> = #own;
            #older
            let #field: #kind = match given { Some(value) => value, None => #otherwise };
        }
    }
}

/// The documentation that `attributes` hold, on one line.
fn doc_text(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| {
        let syn::Meta::NameValue(meta) = &attribute.meta else {
            return None;
        };
        let text = text(meta.value.clone()).ok()?;
        meta.path
            .is_ident("doc")
            .then(|| text.value().trim().to_owned())
    });
    lines.collect::<Vec<_>>().join(" ")
}

/// The name of a type without its path, and its first generic argument.
fn outer(kind: &Type) -> Option<(&Ident, Option<&Type>)> {
    let Type::Path(path) = kind else {
        return None;
    };
    let last = path.path.segments.last()?;
    let first = match &last.arguments {
        PathArguments::AngleBracketed(arguments) => arguments.args.first(),
        _ => None,
    };
    let inner = first.and_then(|argument| match argument {
        GenericArgument::Type(inner) => Some(inner),
        _ => None,
    });
    Some((&last.ident, inner))
}

fn has_reader(attribute: &Attribute) -> bool {
    let text = attribute.meta.to_token_stream().to_string();
    attribute.path().is_ident("serde") && text.contains("deserialize_with")
}

fn is_flatten(attribute: &Attribute) -> bool {
    attribute.path().is_ident("serde")
        && matches!(attribute.parse_args::<Ident>(), Ok(name) if name == "flatten")
}

pub(crate) fn expand(arguments: Arguments, mut item: DeriveInput) -> syn::Result<TokenStream> {
    let section = item.ident.clone();
    let Data::Struct(data) = &mut item.data else {
        return Err(Error::new_spanned(section, "a section is a struct"));
    };
    let mut rules = Vec::new();
    for field in &mut data.fields {
        let rule = Rule::take(field)?;
        field.attrs.extend(rule.attributes(&section));
        rules.push(rule);
    }
    let fields: Vec<_> = rules.iter().map(|rule| &rule.field).collect();
    let kinds = rules.iter().map(|rule| &rule.kind);
    let defaults = rules.iter().map(Rule::default_value);
    let functions = rules.iter().filter_map(Rule::default_function);
    let functions = functions.map(|(_, function)| function);
    let option = CommandLine::of(arguments)?.map(|line| command_line(&section, &line, &rules));
    Ok(quote! {
        #[derive(::serde::Deserialize, ::serde::Serialize, ::schemars::JsonSchema)]
        #item

        impl ::std::default::Default for #section {
            fn default() -> Self {
                #(let #fields: #kinds = #defaults;)*
                Self { #(#fields),* }
            }
        }

        impl #section {
            #(#functions)*
        }

        #option
    })
}

/// The functions of a section that has an option.
fn command_line(section: &Ident, line: &CommandLine, rules: &[Rule]) -> TokenStream {
    let CommandLine { option, about, .. } = line;
    let fields: Vec<_> = rules.iter().map(|rule| &rule.field).collect();
    let keys: Vec<_> = rules.iter().filter(|rule| rule.is_key).collect();
    let declarations = keys.iter().map(|rule| rule.declaration());
    let references = keys.iter().map(|rule| rule.reference(rules));
    let readings = rules.iter().map(Rule::reading);
    let names = keys.iter().map(|rule| rule.key());
    let key_fields = keys.iter().map(|rule| &rule.field);
    let unsupported: Vec<_> = line.unsupported.iter().collect();
    let parse = match &line.parse {
        None => quote!(pub fn parse),
        Some(name) => {
            let name = format_ident!("{}", name.value());
            quote!(fn #name)
        }
    };
    let syntax_doc = format!("Syntax of `--{}`, for its help.", option.value());
    let parse_doc = format!("Reads the value of one `--{}`.", option.value());
    quote! {
        impl #section {
            fn keys() -> crate::options::Keys {
                let mut keys = crate::options::Keys::default();
                #(#declarations)*
                #(keys.hidden(#unsupported);)*
                keys
            }

            #[doc = #syntax_doc]
            pub fn syntax() -> String {
                Self::keys().help(#about)
            }

            /// The keys whose values differ from their defaults. A group of keys has the name of its field.
            pub fn changed_keys(&self) -> impl Iterator<Item = &'static str> {
                let defaults = Self::default();
                let keys = [#((#names, self.#key_fields != defaults.#key_fields)),*];
                keys.into_iter()
                    .filter_map(|(key, is_changed)| is_changed.then_some(key))
            }

            /// The option's part of the page of all options.
            #[cfg(test)]
            pub(crate) fn reference() -> crate::options::OptionReference {
                let mut defaults = ::serde_json::to_value(Self::default()).unwrap_or_default();
                let keys = vec![#(#references),*];
                crate::options::OptionReference { option: #option, keys }
            }

            #[doc = #parse_doc]
            ///
            /// # Errors
            /// An unknown key, a malformed value, or a required key that is absent.
            #parse(text: &str) -> Result<Self, crate::options::OptionError> {
                let options = crate::options::Options::parse(#option, text, Self::keys())?;
                #(options.unsupported(#unsupported)?;)*
                #(#readings)*
                Ok(Self { #(#fields),* })
            }
        }
    }
}
