//! The types of option values.

use std::fmt::Display;
use std::str::FromStr;

use super::fault::{INTEGER_LIST_MAX, ValueError};
use super::split;

/// Integers, each with a list of integers.
pub(crate) type IntegerMap<K, V> = Vec<(K, Vec<V>)>;

/// `on`, `off`, `true` or `false`, in any case.
///
/// # Errors
/// [`ValueError::Toggle`] for anything else.
pub fn parse_toggle(text: &str) -> Result<bool, ValueError> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "true" => Ok(true),
        "off" | "false" => Ok(false),
        _ => Err(ValueError::Toggle(text.to_owned())),
    }
}

/// A number of bytes, with an optional unit.
///
/// # Errors
/// [`ValueError::Size`] if it is malformed or exceeds 64 bits.
pub fn parse_bytes(text: &str) -> Result<u64, ValueError> {
    Ok(byte_size::parse_bytes(text)?)
}

pub(super) fn parse_with<T: FromStr<Err: Display>>(text: &str) -> Result<T, ValueError> {
    text.parse()
        .map_err(|error: T::Err| ValueError::Refused(error.to_string()))
}

pub(super) fn parse_word<T: Copy>(
    text: &str,
    table: &[(&'static str, T)],
) -> Result<T, ValueError> {
    let found = table
        .iter()
        .find(|(word, _)| word.eq_ignore_ascii_case(text));
    found.map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<_> = table.iter().map(|(word, _)| *word).collect();
        ValueError::Word {
            word: text.to_owned(),
            known: known.join(", "),
        }
    })
}

pub(crate) fn parse_strings(text: &str) -> Vec<String> {
    // The settings splitter has already checked that brackets are balanced. A list that cannot be split is one item.
    split::list(text).unwrap_or_else(|_| vec![text.to_owned()])
}

pub(super) fn parse_integers<T: TryFrom<u64>>(text: &str) -> Result<Vec<T>, ValueError> {
    let items = split::list(text.trim()).map_err(|_| ValueError::List(text.to_owned()))?;
    let mut integers = Vec::new();
    for item in &items {
        let (first, last) = match item.split_once('-') {
            Some((first, last)) => (parse_integer(first)?, parse_integer(last)?),
            None => {
                let only = parse_integer(item)?;
                (only, only)
            }
        };
        if last < first {
            return Err(ValueError::RangeBackwards(item.clone()));
        }
        if last - first >= (INTEGER_LIST_MAX - integers.len()) as u64 {
            return Err(ValueError::ListTooLong);
        }
        for integer in first..=last {
            integers
                .push(T::try_from(integer).map_err(|_| ValueError::Integer(integer.to_string()))?);
        }
    }
    Ok(integers)
}

fn parse_integer(text: &str) -> Result<u64, ValueError> {
    let malformed = || ValueError::Integer(text.to_owned());
    let digits = text.trim();
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(malformed());
    }
    digits.parse().map_err(|_| malformed())
}

/// A list of pairs, `[a@b,c@d]`; each is read by `read`. `no_pair` is the error for one without a `@`.
fn parse_pairs<P, C: FromIterator<P>>(
    text: &str,
    no_pair: fn(String) -> ValueError,
    read: impl Fn(&str, &str) -> Result<P, ValueError>,
) -> Result<C, ValueError> {
    let pairs = split::list(text).map_err(|_| ValueError::List(text.to_owned()))?;
    pairs
        .iter()
        .map(|pair| {
            let (first, second) = pair.split_once('@').ok_or_else(|| no_pair(pair.clone()))?;
            read(first, second)
        })
        .collect()
}

/// `[1@[2,3],4@[5]]`.
pub(crate) fn parse_integer_map<K, V>(text: &str) -> Result<IntegerMap<K, V>, ValueError>
where
    K: TryFrom<u64>,
    V: TryFrom<u64>,
{
    parse_pairs(text, ValueError::Pair, |key, values| {
        let key = parse_integer(key)?;
        let key = K::try_from(key).map_err(|_| ValueError::Integer(key.to_string()))?;
        Ok((key, parse_integers(values)?))
    })
}

/// A list of names, each with integers: `[a@[1,2],b@[3]]`.
pub(crate) fn parse_named_integers<V: TryFrom<u64>>(
    text: &str,
) -> Result<Vec<(String, Vec<V>)>, ValueError> {
    parse_pairs(text, ValueError::Pair, |name, values| {
        Ok((name.to_owned(), parse_integers(values)?))
    })
}

/// A list of names, each with an integer: `[a@1,b@2]`.
pub(crate) fn parse_numbered_names<V: TryFrom<u64>>(
    text: &str,
) -> Result<Vec<(String, V)>, ValueError> {
    parse_pairs(text, ValueError::Tuple, |name, value| {
        Ok((name.to_owned(), integer_in_range(value)?))
    })
}

/// `[1@2,3@4]`.
pub(crate) fn parse_integer_pairs<A, B>(text: &str) -> Result<Vec<(A, B)>, ValueError>
where
    A: TryFrom<u64>,
    B: TryFrom<u64>,
{
    parse_pairs(text, ValueError::Tuple, |first, second| {
        Ok((integer_in_range(first)?, integer_in_range(second)?))
    })
}

fn integer_in_range<T: TryFrom<u64>>(text: &str) -> Result<T, ValueError> {
    T::try_from(parse_integer(text)?).map_err(|_| ValueError::Integer(text.to_owned()))
}
