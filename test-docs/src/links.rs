//! Links of a Markdown file.

/// The targets of all links and images outside code, with their lines.
#[must_use]
pub fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (index, line) in prose(text) {
        let mut rest = without_code(line);
        while let Some((_, behind)) = rest.split_once("](") {
            let Some((target, behind)) = behind.split_once(')') else {
                break;
            };
            found.push((index + 1, target.to_owned()));
            rest = behind.to_owned();
        }
    }
    found
}

/// The anchors of the headings, as GitHub makes them.
#[must_use]
pub fn anchors(text: &str) -> Vec<String> {
    prose(text)
        .filter_map(|(_, line)| line.strip_prefix('#'))
        .map(|heading| {
            let heading = heading.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter_map(|it| match it {
                ' ' => Some('-'),
                _ if it.is_alphanumeric() || matches!(it, '-' | '_') => Some(it),
                _ => None,
            });
            kept.collect()
        })
        .collect()
}

/// The lines outside fenced and indented blocks.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter(move |(_, line)| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        !fenced && !is_fence && !line.starts_with("    ")
    })
}

/// The line without what stands between backticks.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;

    use super::*;
    use crate::{documents, root};

    #[test]
    fn links_and_anchors_are_found_outside_code() {
        let text = "# A b, c's `d`\n[x](y.md#z) `[n](o)` ![p](q.svg)\n```\n# no\n[n](o)\n```\n";
        assert_eq!(
            links(text),
            [(2, "y.md#z".to_owned()), (2, "q.svg".to_owned())]
        );
        assert_eq!(anchors(text), ["a-b-cs-d"]);
    }

    #[test]
    fn every_link_leads_to_a_file_and_a_heading() {
        let mut broken = Vec::new();
        let mut checked = 0;
        for document in documents() {
            let text = fs::read_to_string(root().join(&document)).unwrap();
            for (line, target) in links(&text) {
                if target.contains("://") {
                    continue;
                }
                checked += 1;
                let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
                let file = match path {
                    "" => root().join(&document),
                    _ => root().join(&document).parent().unwrap().join(path),
                };
                let found = anchor.is_empty() && file.exists()
                    || fs::read_to_string(&file)
                        .is_ok_and(|text| anchors(&text).iter().any(|it| it == anchor));
                if !found {
                    broken.push(format!("{}:{line}: {target}", document.display()));
                }
            }
        }
        assert!(broken.is_empty(), "{broken:#?}");
        assert!(checked > 50, "only {checked} links were seen");
    }

    /// Folders whose paths the documentation names.
    const FOLDERS: &[&str] = &[
        "api/",
        "bin/",
        "docs/",
        "device-facts/",
        "fleet/",
        "fuzz/",
        "guest-patches/",
        "hypervisor/",
        "machine/",
        "state/",
        "test-docs/",
        "test-server/",
        "chart/",
        "test-skip/",
        "tests/",
        "virtio-devices/",
        "vmm/",
        "xtask/",
    ];

    /// `NAME` in `src/NAME/`; the names of the repository's own such files end in `.md`.
    fn is_placeholder(part: &str) -> bool {
        part.len() > 1 && part.chars().all(|it| it.is_ascii_uppercase())
    }

    #[test]
    fn every_file_that_is_named_exists() {
        let mut missing = Vec::new();
        for document in documents() {
            let text = fs::read_to_string(root().join(&document)).unwrap();
            for (index, line) in prose(&text) {
                for path in line.split('`').skip(1).step_by(2) {
                    let is_path = FOLDERS.iter().any(|folder| path.starts_with(folder))
                        && !path.split(['/', '.']).any(is_placeholder)
                        && path
                            .chars()
                            .all(|it| it.is_ascii_alphanumeric() || "/._-".contains(it));
                    if is_path && !root().join(path).exists() {
                        missing.push(format!("{}:{}: {path}", document.display(), index + 1));
                    }
                }
            }
        }
        assert!(missing.is_empty(), "{missing:#?}");
    }
}
