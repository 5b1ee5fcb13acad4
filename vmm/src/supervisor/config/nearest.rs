//! The valid name nearest to a misspelt one, for error messages.

/// The number of insertions, removals, replacements and swaps of neighbours that lead from `a` to `b`
/// (restricted Damerau-Levenshtein distance).
fn distance(a: &str, b: &str) -> usize {
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    let mut before: Vec<usize> = Vec::new();
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut best = (previous[j] + usize::from(x != y)).min(previous[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                best = best.min(before[j - 1] + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut previous, row);
    }
    previous.last().copied().unwrap_or(0)
}

/// The candidate nearest to `word`, unless all of them are too far off to be what was meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (distance(&word, candidate), candidate))
        .min()
        .filter(|(far, candidate)| *far <= (candidate.chars().count() / 2).max(1))
        .map(|(_, candidate)| candidate)
}

/// " (did you mean 'x'?)", or all valid names when none is near.
pub fn hint(word: &str, candidates: &[&str]) -> String {
    match nearest(word, candidates.iter().copied()) {
        Some(near) => format!("did you mean '{near}'?"),
        None => format!("valid: {}", candidates.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_misspelt_keys() {
        let keys = ["kernel", "initrd", "memory", "cmdline", "disk"];
        assert_eq!(nearest("kernal", keys), Some("kernel"));
        assert_eq!(nearest("memroy", keys), Some("memory"));
        assert_eq!(nearest("MEMORY", keys), Some("memory"));
        assert_eq!(nearest("disks", keys), Some("disk"));
        assert_eq!(nearest("bananas", keys), None);
    }

    #[test]
    fn a_hint_lists_all_names_when_none_is_near() {
        assert_eq!(hint("bananas", &["path", "id"]), "valid: path, id");
        assert_eq!(hint("pth", &["path", "id"]), "did you mean 'path'?");
    }

    #[test]
    fn distance_counts_swaps_once() {
        assert_eq!(distance("ab", "ba"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("abc", "abc"), 0);
    }
}
