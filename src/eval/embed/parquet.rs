//! Features as Parquet: a row for each record.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use ::parquet::data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int64Type};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use ::parquet::schema::parser::parse_message_type;
use ::parquet::schema::types::ColumnPath;

use super::{Sink, Table};
use crate::atomic::write_whole;
use crate::error::{Error, Result};

const SCHEMA: &str = "
message features {
  required int64 id;
  optional int64 label;
  optional binary class (STRING);
  required group feature (LIST) { repeated group list { required float element; } }
}";
/// Values of a row group: what is held in memory, and what a reader takes at once.
const GROUP_VALUES: usize = 1 << 21;

type File<'a> = SerializedFileWriter<&'a mut (dyn Write + Send)>;
type Group<'a, 'b> = SerializedRowGroupWriter<'a, &'b mut (dyn Write + Send)>;

/// Writes the rows of `table` to `path`.
pub(super) fn write(path: &Path, table: &Table<'_>, rows: &mut dyn FnMut(&mut Sink<'_>) -> Result<()>) -> Result<()> {
    let refused = |e: ParquetError| Error::io("write", path)(io::Error::other(e));
    let schema = Arc::new(parse_message_type(SCHEMA).map_err(refused)?);
    let told = table.metadata.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone())).collect();
    // No two features share a value: a dictionary of them would be in vain.
    let feature = ColumnPath::from(["feature", "list", "element"].map(String::from).to_vec());
    let properties = WriterProperties::builder()
        .set_created_by(format!("simsiam-engine {}", env!("CARGO_PKG_VERSION")))
        .set_column_dictionary_enabled(feature, false)
        .set_key_value_metadata(Some(told))
        .build();
    let group_rows = (GROUP_VALUES / table.dim).max(1);
    write_whole(path, |out| {
        let mut file: File<'_> = SerializedFileWriter::new(out, schema, Arc::new(properties)).map_err(refused)?;
        let (mut first, mut pending) = (0, Vec::new());
        rows(&mut |_, values| {
            pending.extend_from_slice(values);
            while pending.len() >= group_rows * table.dim {
                let rest = pending.split_off(group_rows * table.dim);
                write_group(&mut file, path, table, first, &pending)?;
                first += group_rows;
                pending = rest;
            }
            Ok(())
        })?;
        if !pending.is_empty() {
            write_group(&mut file, path, table, first, &pending)?;
        }
        file.close().map(drop).map_err(refused)
    })
}

/// Writes the rows of the records from `first` on.
fn write_group(file: &mut File<'_>, path: &Path, table: &Table<'_>, first: usize, features: &[f32]) -> Result<()> {
    let records = first..first + features.len() / table.dim;
    let labels: Vec<Option<u32>> =
        records.clone().map(|record| table.dataset.label(record)).collect::<Result<Vec<_>>>()?;
    let there: Vec<i16> = labels.iter().map(|label| label.is_some().into()).collect();
    let known: Vec<u32> = labels.into_iter().flatten().collect();
    let ids: Vec<i64> = records.clone().map(|record| record as i64).collect();
    let numbers: Vec<i64> = known.iter().map(|&label| label.into()).collect();
    let classes = table.dataset.classes();
    let names: Vec<ByteArray> = known.iter().map(|&label| classes[label as usize].as_str().into()).collect();
    let element_there = vec![1i16; features.len()];
    let goes_on: Vec<i16> = (0..features.len()).map(|i| i16::from(i % table.dim > 0)).collect();
    let columns = |group: &mut Group<'_, '_>| {
        write_column::<Int64Type>(group, &ids, None, None)?;
        write_column::<Int64Type>(group, &numbers, Some(&there), None)?;
        write_column::<ByteArrayType>(group, &names, Some(&there), None)?;
        write_column::<FloatType>(group, features, Some(&element_there), Some(&goes_on))
    };
    let mut write = || {
        let mut group = file.next_row_group()?;
        columns(&mut group)?;
        group.close().map(drop)
    };
    write().map_err(|e: ParquetError| Error::io("write", path)(io::Error::other(e)))
}

fn write_column<T: DataType>(
    group: &mut Group<'_, '_>,
    values: &[T::T],
    definition: Option<&[i16]>,
    repetition: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let Some(mut column) = group.next_column()? else {
        return Err(ParquetError::General("the schema has fewer columns than are written".into()));
    };
    column.typed::<T>().write_batch(values, definition, repetition)?;
    column.close()
}
