//! Choices that are text on the command line, and the same text in configuration files.

/// Lets serde read and write a choice as the text that the command line takes.
macro_rules! written_as_text {
    ($choice:ty) => {
        impl TryFrom<String> for $choice {
            type Error = String;

            fn try_from(text: String) -> std::result::Result<$choice, String> {
                text.parse()
            }
        }

        impl From<$choice> for String {
            fn from(one: $choice) -> String {
                one.to_string()
            }
        }
    };
}
pub(crate) use written_as_text;
