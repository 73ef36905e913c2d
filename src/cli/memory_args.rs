//! How the memory of a step is kept small.

use crate::graph::budget::MemoryBudget;
use crate::nn::views::Views;
use crate::train::memory::MemoryChoice;

#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Memory")]
pub struct MemoryArgs {
    /// How both views go through the network: together, or sequential, one after the other, which keeps half the activations
    /// for a sixth more work and changes results by rounding alone [default: together; with --resume, as before].
    #[arg(long, value_enum, hide_possible_values = true, value_name = "together|sequential")]
    views: Option<Views>,
    #[command(flatten)]
    budget: BudgetArgs,
}

#[derive(Debug, Clone, Copy, clap::Args)]
#[command(next_help_heading = "Memory")]
pub struct BudgetArgs {
    /// Memory that a step may take, as 24GB or 22GiB, or min: activations are computed again on the way back until it does,
    /// with as little traffic as possible. Does not change any result [default: none; with --resume, as before].
    #[arg(long, value_name = "SIZE|min|none")]
    memory_budget: Option<MemoryBudget>,
}

impl MemoryArgs {
    /// What is asked for, the rest as `before`.
    pub fn choose(&self, before: MemoryChoice) -> MemoryChoice {
        MemoryChoice { views: self.views.unwrap_or(before.views), ..self.budget.choose(before) }
    }
}

impl BudgetArgs {
    /// What is asked for, the rest as `before`.
    pub fn choose(&self, before: MemoryChoice) -> MemoryChoice {
        MemoryChoice { budget: self.memory_budget.unwrap_or(before.budget), ..before }
    }
}
