//! Files that appear whole or not at all, also across a crash or a power failure.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

const BUFFER: usize = 1 << 20;

/// Lets `fill` write a temporary file beside `path`, makes it durable, then renames it to `path`. On any error `path` is
/// left as it was and the temporary is removed; after a kill only a `.<name>.*.tmp` may stay behind.
///
/// # Errors
/// [`Error::Io`] with the step that failed.
pub fn write_atomic(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    write_verified(path, fill, |_| Ok(()))
}

/// As [`write_atomic`], but the file gets its name only after `verify` has read the temporary one and found it good. Returns
/// what `verify` does.
///
/// # Errors
/// [`Error::Io`] with the step that failed, or the error of `verify`.
pub fn write_verified<T>(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    verify: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    write_temporary(path, |out| fill(out).map_err(Error::io("write", path)), verify)
}

/// As [`write_atomic`], when what is written may fail to come about for reasons of its own.
///
/// # Errors
/// What `fill` returns; [`Error::Io`] with the step that failed.
pub fn write_whole(path: &Path, fill: impl FnOnce(&mut (dyn Write + Send)) -> Result<()>) -> Result<()> {
    write_temporary(path, fill, |_| Ok(()))
}

fn write_temporary<T>(
    path: &Path,
    fill: impl FnOnce(&mut (dyn Write + Send)) -> Result<()>,
    verify: impl FnOnce(&Path) -> Result<T>,
) -> Result<T> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| {
        Error::io("write", path)(io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name"))
    })?;
    let mut file = temporary(&format!(".{}.", name.to_string_lossy()))
        .tempfile_in(folder)
        .map_err(Error::io("create a file in", folder))?;
    let mut buffered = BufWriter::with_capacity(BUFFER, file.as_file_mut());
    fill(&mut buffered)?;
    buffered.flush().map_err(Error::io("write", path))?;
    drop(buffered);
    file.as_file().sync_all().map_err(Error::io("make durable", path))?;
    let verified = verify(file.path())?;
    file.persist(path).map_err(|e| Error::io("rename to", path)(e.error))?;
    sync_folder(folder)?;
    Ok(verified)
}

/// Temporaries get the permissions of ordinary new files, not the private ones of a file in `/tmp`.
fn temporary(prefix: &str) -> tempfile::Builder<'_, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix).suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666)); // the umask still applies
    builder
}

/// Makes renames and removals in `folder` durable, where the system can.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be synced.
pub fn sync_folder(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("make durable", folder))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_whole_files_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.bin");
        write_atomic(&path, |out| out.write_all(b"first")).unwrap();
        let error = write_atomic(&path, |out| {
            out.write_all(&[7; 3 * BUFFER])?;
            Err(io::Error::other("disk on fire"))
        });
        assert!(error.unwrap_err().to_string().contains("disk on fire"));
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        write_atomic(&path, |out| out.write_all(b"second")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary was left behind");
    }

    #[test]
    fn a_file_that_is_found_bad_never_gets_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.bin");
        let read = |temporary: &Path| std::fs::read(temporary).map_err(Error::io("read", temporary));
        assert_eq!(write_verified(&path, |out| out.write_all(b"good"), read).unwrap(), b"good");
        let bad = |_: &Path| Err::<(), _>(Error::Mismatch("not what was meant".into()));
        let error = write_verified(&path, |out| out.write_all(b"bad"), bad).unwrap_err();
        assert_eq!(error.to_string(), "not what was meant");
        assert_eq!(std::fs::read(&path).unwrap(), b"good");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary was left behind");
    }

    #[cfg(unix)]
    #[test]
    fn has_the_permissions_of_a_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (plain, atomic) = (folder.path().join("plain"), folder.path().join("atomic"));
        std::fs::write(&plain, "").unwrap();
        write_atomic(&atomic, |_| Ok(())).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&plain), mode(&atomic));
    }

    #[test]
    fn missing_folder_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let message = write_atomic(&folder.path().join("no/file"), |_| Ok(())).unwrap_err().to_string();
        assert!(message.contains("create a file in") && message.contains("no"), "{message}");
    }
}
