//! cuDNN's descriptors: objects of many kinds that are filled attribute by attribute and then finished.
#![allow(unsafe_code)] // calls of cuDNN

use std::fmt;
use std::sync::Arc;

use bytemuck::{NoUninit, Pod, Zeroable};

use crate::error::Result;

use super::constants::kind;
use super::{Cudnn, Opaque};

/// A descriptor; once finished it is only read.
pub struct Descriptor {
    cudnn: Arc<Cudnn>,
    raw: Opaque,
    /// What it refers to must outlive it.
    refers_to: Vec<Arc<Descriptor>>,
}

// SAFETY: after `finish` a descriptor is only read, which cuDNN allows from any thread.
unsafe impl Send for Descriptor {}
// SAFETY: as for `Send`.
unsafe impl Sync for Descriptor {}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuDNN descriptor {:p}", self.raw)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; what refers to it holds it and was destroyed before.
        unsafe { (self.cudnn.functions.cudnnBackendDestroyDescriptor)(self.raw) };
    }
}

impl Descriptor {
    /// An empty one of the kind `descriptor`.
    pub(super) fn new(cudnn: &Arc<Cudnn>, descriptor: i32) -> Result<Descriptor> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes the descriptor.
        let status = unsafe { (cudnn.functions.cudnnBackendCreateDescriptor)(descriptor, &mut raw) };
        cudnn.check(status, &format!("make descriptor {descriptor}"))?;
        Ok(Descriptor { cudnn: cudnn.clone(), raw, refers_to: vec![] })
    }

    pub(super) fn cudnn(&self) -> &Arc<Cudnn> {
        &self.cudnn
    }

    pub(super) fn raw(&self) -> Opaque {
        self.raw
    }

    /// Sets an attribute to values of the type that `kind` stands for; they are copied.
    pub(super) fn set<T: NoUninit>(self, attribute: i32, kind: i32, values: &[T]) -> Result<Descriptor> {
        self.set_raw(attribute, kind, values.len(), values.as_ptr().cast())
    }

    /// Sets an attribute to other descriptors, which this one then keeps alive.
    pub(super) fn refer(mut self, attribute: i32, others: &[&Arc<Descriptor>]) -> Result<Descriptor> {
        let raw: Vec<Opaque> = others.iter().map(|other| other.raw).collect();
        self = self.set_raw(attribute, kind::BACKEND_DESCRIPTOR, raw.len(), raw.as_ptr().cast())?;
        self.refers_to.extend(others.iter().map(|other| Arc::clone(other)));
        Ok(self)
    }

    /// Sets an attribute to handles or device pointers.
    pub(super) fn pointers(self, attribute: i32, kind: i32, pointers: &[Opaque]) -> Result<Descriptor> {
        self.set_raw(attribute, kind, pointers.len(), pointers.as_ptr().cast())
    }

    fn set_raw(self, attribute: i32, kind: i32, count: usize, values: *const std::ffi::c_void) -> Result<Descriptor> {
        let set = self.cudnn.functions.cudnnBackendSetAttribute;
        // SAFETY: `values` points to `count` values, whose size cuDNN checks by `kind`; it copies them.
        let status = unsafe { set(self.raw, attribute, kind, count as i64, values) };
        self.cudnn.check(status, &format!("set attribute {attribute}"))?;
        Ok(self)
    }

    /// Finishes it; `action` is what that means, for the error.
    pub(super) fn finish(self, action: &str) -> Result<Descriptor> {
        // SAFETY: the descriptor is alive.
        let status = unsafe { (self.cudnn.functions.cudnnBackendFinalize)(self.raw) };
        self.cudnn.check(status, action)?;
        Ok(self)
    }

    /// Up to `most` values of an attribute, of the type that `kind` stands for.
    pub(super) fn get<T: Pod>(&self, attribute: i32, kind: i32, most: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); most];
        let count = self.get_raw(attribute, kind, most, values.as_mut_ptr().cast())?;
        values.truncate(count);
        Ok(values)
    }

    /// All values of an attribute.
    pub(super) fn get_all<T: Pod>(&self, attribute: i32, kind: i32) -> Result<Vec<T>> {
        let count = self.get_raw(attribute, kind, 0, std::ptr::null_mut())?;
        self.get(attribute, kind, count)
    }

    /// One integer.
    pub(super) fn integer(&self, attribute: i32) -> Result<i64> {
        let values: Vec<i64> = self.get(attribute, kind::INT64, 1)?;
        Ok(values.first().copied().unwrap_or_default())
    }

    /// Up to `most` descriptors of an attribute, copied into new ones of the kind `descriptor`.
    pub(super) fn get_descriptors(&self, attribute: i32, descriptor: i32, most: usize) -> Result<Vec<Descriptor>> {
        let empty = (0..most).map(|_| Descriptor::new(&self.cudnn, descriptor)).collect::<Result<Vec<_>>>();
        let mut descriptors = empty?;
        let mut raw: Vec<Opaque> = descriptors.iter().map(|one| one.raw).collect();
        let count = self.get_raw(attribute, kind::BACKEND_DESCRIPTOR, most, raw.as_mut_ptr().cast())?;
        descriptors.truncate(count);
        Ok(descriptors)
    }

    /// How many descriptors an attribute has.
    pub(super) fn count_descriptors(&self, attribute: i32) -> Result<usize> {
        self.get_raw(attribute, kind::BACKEND_DESCRIPTOR, 0, std::ptr::null_mut())
    }

    /// Keeps `other` alive as long as this one.
    pub(super) fn keep(mut self, other: &Arc<Descriptor>) -> Descriptor {
        self.refers_to.push(Arc::clone(other));
        self
    }

    /// Writes up to `most` values and returns how many there are.
    fn get_raw(&self, attribute: i32, kind: i32, most: usize, values: Opaque) -> Result<usize> {
        let mut count = 0;
        let get = self.cudnn.functions.cudnnBackendGetAttribute;
        // SAFETY: `values` has room for `most` values of the size that cuDNN checks by `kind`.
        let status = unsafe { get(self.raw, attribute, kind, most as i64, &mut count, values) };
        self.cudnn.check(status, &format!("tell attribute {attribute}"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }
}

/// A C `bool`.
#[derive(Debug, Clone, Copy, NoUninit, Zeroable)]
#[repr(transparent)]
pub(super) struct Flag(pub u8);
