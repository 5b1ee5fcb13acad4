//! Which CPUs the interrupts of the I/O APIC may go to: the one in the host's kernel has 8 bits for a destination, while Linux takes
//! it for one with 15 bits where messages have them.

use std::borrow::Cow;

use super::MachineConfig;

/// Linux's parameter (Documentation/admin-guide/kernel-parameters.txt).
const PARAMETER: &str = "irqaffinity=";

impl MachineConfig {
    /// The kernel's command line, which keeps those interrupts from CPUs that they do not reach, unless the user has a word on that.
    pub fn kernel_command_line(&self) -> String {
        complete(&self.cmdline, self.topology.reached_by_io_apic()).into_owned()
    }

    /// What the user has to see to, since nobody else does.
    pub fn irq_affinity_warning(&self) -> Option<String> {
        warning(&self.cmdline, self.firmware.is_some(), self.topology.reached_by_io_apic()?)
    }
}

/// Ours comes first: what follows a `--` is for init.
fn complete(given: &str, reached: Option<usize>) -> Cow<'_, str> {
    match reached {
        Some(reached) if !chosen(given) => {
            let all = format!("{PARAMETER}0-{} {given}", reached.saturating_sub(1));
            Cow::Owned(all.trim_end().to_owned())
        }
        _ => Cow::Borrowed(given),
    }
}

fn warning(given: &str, firmware: bool, reached: usize) -> Option<String> {
    let what = match firmware {
        true => "what firmware starts is not told",
        false if chosen(given) => "--cmdline has an irqaffinity= of its own",
        false => return None,
    };
    let last = reached.saturating_sub(1);
    Some(format!(
        "interrupts of ISA devices, the SCI and INTx# reach CPUs 0-{last} alone, and {what}: \
         the guest's kernel needs irqaffinity=0-{last}, or fewer"
    ))
}

fn chosen(given: &str) -> bool {
    given.split_whitespace().take_while(|word| *word != "--").any(|word| word.starts_with(PARAMETER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_are_kept_where_they_arrive_unless_the_user_chose() {
        assert_eq!(complete("quiet", None), "quiet");
        assert_eq!(complete("", Some(255)), "irqaffinity=0-254");
        assert_eq!(complete("quiet -- single", Some(255)), "irqaffinity=0-254 quiet -- single");
        for other in ["quiet -- irqaffinity=3", "x.irqaffinity=3", "irqaffinity"] {
            assert_eq!(complete(other, Some(9)), format!("irqaffinity=0-8 {other}"));
        }
        for own in ["irqaffinity=3", "quiet irqaffinity=0-3 -- single"] {
            assert_eq!(complete(own, Some(255)), own);
        }
    }

    #[test]
    fn the_user_hears_where_nothing_keeps_them() {
        assert_eq!(warning("quiet", false, 255), None);
        assert!(warning("quiet irqaffinity=0-3", false, 255).unwrap().contains("of its own"));
        assert!(warning("", true, 255).unwrap().contains("needs irqaffinity=0-254"));
    }
}
