//! Markdown tables, and what a list of measurements comes to.

/// Prints a table.
pub fn print(title: &str, header: &[&str], rows: &[Vec<String>]) {
    head(title, header);
    rows.iter().for_each(|cells| row(cells));
}

/// Begins a table whose rows come later.
pub fn head(title: &str, header: &[&str]) {
    println!("\n## {title}\n\n| {} |", header.join(" | "));
    println!("|{}", " --- |".repeat(header.len()));
}

/// Prints a row.
pub fn row(cells: &[String]) {
    println!("| {} |", cells.join(" | "));
}

/// The value in the middle; the mean of the two in the middle of an even number; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |index: usize| sorted.get(index).copied().unwrap_or(0.0);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { at(middle) } else { f64::midpoint(at(middle.saturating_sub(1)), at(middle)) }
}

/// The smallest and the largest, as text.
pub fn spread(values: &[f64]) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(0.0, f64::max);
    format!("{least:.1}–{most:.1}")
}

/// How a value stands to its limit.
pub fn verdict(value: f64, limit: f64) -> String {
    format!("{} (limit {limit})", if value <= limit { "holds" } else { "**missed**" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }
}
