//! The `simsiam-engine` binary.

fn main() -> std::process::ExitCode {
    simsiam_engine::cli::main()
}
