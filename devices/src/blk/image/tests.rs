use super::*;

#[test]
fn what_an_image_says_cannot_steer_a_terminal() {
    let error = io::Error::other("names \u{1b}[2J\n".repeat(200));
    let text = describe(&error);
    assert!(!text.chars().any(char::is_control) && text.len() <= 1600, "{text}");
}
