//! How the memory of a step is kept small, at the price of work or traffic.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::graph::Tape;
use crate::graph::budget::{MemoryBudget, Trade, fit};
use crate::graph::plan::Target;
use crate::nn::views::Views;

/// What is asked for; by default nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryChoice {
    /// Whether the views go through the network together.
    #[serde(default)]
    pub views: Views,
    /// What a step may take; activations are computed again until it does.
    #[serde(default)]
    pub budget: MemoryBudget,
}

impl MemoryChoice {
    /// The tape of a step that keeps to the budget on devices of `target`, and what that costs.
    ///
    /// # Errors
    /// [`crate::error::Error::Config`] when recomputation alone cannot meet it.
    pub fn fit(&self, tape: Tape, target: Target) -> Result<(Tape, Option<Trade>)> {
        match self.budget {
            MemoryBudget::Unlimited => Ok((tape, None)),
            budget => fit(&tape, target, budget).map(|(tape, trade)| (tape, Some(trade))),
        }
    }

    /// Whether nothing is asked for.
    pub fn is_default(&self) -> bool {
        *self == MemoryChoice::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_survive_the_configuration() {
        for (views, budget) in [(Views::Together, "none"), (Views::Sequential, "24GB"), (Views::Together, "min")] {
            let choice = MemoryChoice { views, budget: budget.parse().unwrap() };
            let text = toml::to_string(&choice).unwrap();
            assert_eq!(toml::from_str::<MemoryChoice>(&text).unwrap(), choice, "{text}");
            assert_eq!(choice.is_default(), text == "views = \"together\"\nbudget = \"none\"\n", "{text}");
        }
        assert!(toml::from_str::<MemoryChoice>("").unwrap().is_default());
    }

    #[test]
    fn sizes_are_decimal_unless_they_say_otherwise() {
        for (text, bytes) in
            [("24G", 24_000_000_000), ("24GB", 24_000_000_000), ("500M", 500_000_000), ("3GiB", 3 << 30)]
        {
            assert_eq!(text.parse(), Ok(MemoryBudget::Bytes(bytes)), "{text}");
        }
        for text in ["", "0", "much", "-3GB"] {
            let message = text.parse::<MemoryBudget>().unwrap_err();
            assert!(message.starts_with("expected a size, as 24GB"), "{text}: {message}");
        }
    }
}
