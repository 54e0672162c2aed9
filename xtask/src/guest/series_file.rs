//! Names of patches after a refresh, and the `series` file that lists them.
//!
//! A patch is identified by its subject. A patch with a new subject replaces an unclaimed old patch between the same
//! neighbours. Otherwise, it gets a free number after its predecessor.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use super::series::{Patch, names};

/// The name of each commit's patch, in order.
pub(super) fn assign(old: &[Patch], commits: &[Patch]) -> Result<Vec<String>> {
    let subjects: Vec<Option<String>> = old.iter().map(Patch::subject).collect();
    let mut claimed = BTreeSet::new();
    let mut known: Vec<Option<usize>> = Vec::new();
    for commit in commits {
        let subject = commit.subject();
        let place =
            (0..old.len()).find(|index| !claimed.contains(index) && subjects[*index] == subject);
        claimed.extend(place);
        known.push(place);
    }
    for index in 0..commits.len() {
        if known[index].is_some() {
            continue;
        }
        let first = known[..index]
            .iter()
            .rev()
            .flatten()
            .next()
            .map_or(0, |at| at + 1);
        let end = known[index..]
            .iter()
            .flatten()
            .next()
            .copied()
            .unwrap_or(old.len());
        let place = (first..end.max(first)).find(|at| !claimed.contains(at));
        claimed.extend(place);
        known[index] = place;
    }
    let mut result: Vec<String> = Vec::new();
    for (index, commit) in commits.iter().enumerate() {
        let name = match known[index] {
            Some(at) => old[at].name.clone(),
            None => {
                let next = known[index..].iter().flatten().next();
                let next = next.and_then(|at| number(&old[*at].name));
                new_name(result.last().map(String::as_str), next, &commit.name)?
            }
        };
        result.push(name);
    }
    Ok(result)
}

/// A number and its digits at the start of a name.
fn number(name: &str) -> Option<(u32, usize)> {
    let digits = name.chars().take_while(char::is_ascii_digit).count();
    Some((name[..digits].parse().ok()?, digits))
}

/// The name after `previous` and before the number `next` for a patch that git named
/// `0001-what-it-does.patch`.
fn new_name(previous: Option<&str>, next: Option<(u32, usize)>, git: &str) -> Result<String> {
    let (before, digits) = previous
        .and_then(number)
        .or(next.map(|(_, digits)| (0, digits)))
        .unwrap_or((0, 3));
    let own = before + 1;
    ensure!(
        next.is_none_or(|(next, _)| own < next),
        "no number is free between {} and {}: rename patches in the series first",
        before,
        next.map_or(0, |(next, _)| next)
    );
    let rest = git.trim_start_matches(|c: char| c.is_ascii_digit());
    Ok(format!("{own:0digits$}{rest}"))
}

/// The series file with `new` names; each comment stays before its patch.
pub(super) fn rewrite(old: &str, new: &[String]) -> String {
    let mut comments: Vec<(Option<String>, String)> = Vec::new();
    let mut pending = String::new();
    for line in old.lines() {
        let name = names(line).next().map(str::to_string);
        match name {
            // The comment of a removed patch moves to the next one.
            Some(name) if new.contains(&name) => {
                comments.push((Some(name), std::mem::take(&mut pending)));
            }
            Some(_) => {}
            None => {
                pending.push_str(line);
                pending.push('\n');
            }
        }
    }
    let mut text = String::new();
    for name in new {
        for (_, comment) in comments.iter().filter(|(of, _)| of.as_ref() == Some(name)) {
            text.push_str(comment);
        }
        text.push_str(name);
        text.push('\n');
    }
    text + &pending
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch(name: &str, subject: &str) -> Patch {
        Patch {
            name: name.into(),
            text: format!("From 0\nSubject: [PATCH] {subject}\n\nWhy.\n"),
        }
    }

    fn old() -> Vec<Patch> {
        vec![
            patch("001-a.patch", "a"),
            patch("101-b.patch", "b"),
            patch("102-c.patch", "c"),
        ]
    }

    #[test]
    fn names_stay_with_their_subjects() {
        let commits = [patch("0001-b.patch", "b"), patch("0002-a.patch", "a")];
        assert_eq!(
            assign(&old(), &commits).unwrap(),
            ["101-b.patch", "001-a.patch"]
        );
    }

    #[test]
    fn name_of_a_patch_with_a_new_subject_is_kept() {
        let commits = [
            patch("0001-a.patch", "a"),
            patch("0002-x.patch", "x"),
            patch("0003-c.patch", "c"),
        ];
        assert_eq!(
            assign(&old(), &commits).unwrap(),
            ["001-a.patch", "101-b.patch", "102-c.patch"]
        );
    }

    #[test]
    fn name_of_a_new_patch_is_the_next_free_number() {
        let mut commits = old();
        commits.insert(1, patch("0002-new-one.patch", "new one"));
        assert_eq!(assign(&old(), &commits).unwrap()[1], "002-new-one.patch");
        commits.insert(3, patch("0004-no-room.patch", "no room"));
        assert!(assign(&old(), &commits).is_err());
    }

    #[test]
    fn series_keeps_its_comments() {
        let old = "# 0xx preparation\n001-a.patch\n\n# 1xx mm\n101-b.patch\n102-c.patch\n# end\n";
        let new = ["001-a.patch", "102-c.patch", "103-d.patch"].map(str::to_string);
        assert_eq!(
            rewrite(old, &new),
            "# 0xx preparation\n001-a.patch\n\n# 1xx mm\n102-c.patch\n103-d.patch\n# end\n"
        );
    }
}
