//! Functions of a library that is loaded at run time, as a table.

/// Declares a table of C functions. `load` looks all of them up: a library that lacks one is refused, nothing panics.
///
/// Enumerations of the library's are plain `i32`: a newer library may return values that a Rust enum would not know.
macro_rules! functions {
    ($(#[$doc:meta])* $table:ident { $(fn $name:ident($($type:ty),* $(,)?) $(-> $out:ty)?;)* }) => {
        $(#[$doc])*
        #[allow(non_snake_case)]
        #[derive(Debug, Clone, Copy)]
        struct $table {
            $(pub $name: unsafe extern "C" fn($($type),*) $(-> $out)?,)*
        }

        impl $table {
            /// Looks the functions up in `library`, which stays loaded as long as the program runs.
            fn load(library: &'static libloading::Library, name: &str) -> $crate::error::Result<$table> {
                let missing = |error: libloading::Error| $crate::error::Error::Unsupported {
                    what: format!("{name} lacks a function of its interface: {}", $crate::backend::cuda::reason(&error)),
                    hint: Some("install a newer version".into()),
                };
                Ok($table {
                    // SAFETY: the types are those of the library's header; it is never unloaded.
                    $($name: *unsafe { library.get(concat!(stringify!($name), "\0")) }.map_err(missing)?,)*
                })
            }
        }
    };
}

pub(super) use functions;
