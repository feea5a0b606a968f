//! NCCL, found at run time: the exchanges of [`Collective`] between the cards of one process.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use cudarc::driver::sys::CUstream;

use super::collective::Collective;
use super::driver::{self, Address};
use crate::Error;

/// A name of a group of ranks, which only they know.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([c_char; 128]);

/// What a communicator is made with: as much of ncclConfig_t as NCCL 2.14 had, which later ones fill up themselves.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    is_blocking: c_int,
}

impl Config {
    /// Calls return at once, and [`Rank::settle`] waits: so what hangs because another rank has failed can be left.
    fn new() -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_400,
            is_blocking: 0,
        }
    }
}

type Comm = *mut c_void;
/// ncclUint8: everything is moved as bytes.
const BYTES: c_int = 1;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// The oldest whose calls that do not block may be begun by one thread and ended by another.
const OLDEST: usize = 22_700;

/// The functions of the library, as nccl.h declares them.
struct Library {
    get_version: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
}

impl Library {
    /// The library, where it can be loaded.
    fn get() -> Option<&'static Self> {
        static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref()
    }

    #[expect(
        clippy::missing_transmute_annotations,
        reason = "the fields say what the symbols are"
    )]
    fn load() -> Option<Self> {
        driver::find_packages();
        let names = [c"libnccl.so.2", c"libnccl.so"];
        // SAFETY: names are C strings; the library stays loaded, and its initialisers are NVIDIA's.
        let handle = names
            .iter()
            .map(|name| unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY) })
            .find(|handle| !handle.is_null())?;
        // SAFETY: each symbol has the type that nccl.h gives it, which has not changed in NCCL 2.
        unsafe {
            let symbol =
                |name: &CStr| Some(libc::dlsym(handle, name.as_ptr())).filter(|s| !s.is_null());
            macro_rules! function {
                ($name:literal) => {
                    std::mem::transmute::<*mut c_void, _>(symbol($name)?)
                };
            }
            Some(Self {
                get_version: function!(c"ncclGetVersion"),
                get_unique_id: function!(c"ncclGetUniqueId"),
                comm_init_rank: function!(c"ncclCommInitRankConfig"),
                comm_abort: function!(c"ncclCommAbort"),
                comm_get_async_error: function!(c"ncclCommGetAsyncError"),
                get_error_string: function!(c"ncclGetErrorString"),
                group_start: function!(c"ncclGroupStart"),
                group_end: function!(c"ncclGroupEnd"),
                send: function!(c"ncclSend"),
                recv: function!(c"ncclRecv"),
            })
        }
    }

    fn text(&self, status: c_int) -> String {
        // SAFETY: the library returns a constant C string for any number.
        let text = unsafe { CStr::from_ptr((self.get_error_string)(status)) };
        text.to_string_lossy().into_owned()
    }

    fn check(&self, what: &str, status: c_int) -> Result<(), Error> {
        match status {
            SUCCESS => Ok(()),
            status => Err(Error::device(
                format!("NCCL {what}: {}", self.text(status)),
                "NCCL_DEBUG=INFO makes it say more; one card needs no NCCL",
            )),
        }
    }
}

/// The library's version, for example 22809 for 2.28.9.
pub(crate) fn version() -> Option<usize> {
    let library = Library::get()?;
    let mut version = 0;
    // SAFETY: the library writes one number.
    let status = unsafe { (library.get_version)(&mut version) };
    (status == SUCCESS).then_some(version as usize)
}

/// The library, if it is there and will do.
fn library() -> Result<&'static Library, Error> {
    check(Library::get().zip(version()))
}

/// Whether it is.
pub(crate) fn probe() -> Result<(), Error> {
    library().map(drop)
}

fn check<L>(found: Option<(L, usize)>) -> Result<L, Error> {
    let what = match found {
        Some((library, version)) if version >= OLDEST => return Ok(library),
        Some(_) => "NCCL 2.27 or newer is needed",
        None => "NCCL, which joins several cards, cannot be loaded (libnccl.so.2)",
    };
    Err(Error::device(
        what,
        "`pip install nvidia-nccl-cu13` brings it; in an active virtual environment it is found, else put its folder into \
         LD_LIBRARY_PATH; one card needs none",
    ))
}

/// What makes a group of ranks: made once, used by each.
pub(crate) struct Group {
    library: &'static Library,
    id: UniqueId,
}

impl Group {
    /// # Errors
    /// If the library is missing, too old, or finds no way between cards.
    pub(crate) fn new() -> Result<Self, Error> {
        let library = library()?;
        let mut id = UniqueId([0; 128]);
        // SAFETY: the library writes one name.
        library.check("makes no group", unsafe {
            (library.get_unique_id)(&mut id)
        })?;
        Ok(Self { library, id })
    }

    /// Joins as `rank`, on the calling thread's card; returns when all ranks have, or `failed` says that one will not.
    ///
    /// # Errors
    /// If the cards find no way to each other.
    pub(crate) fn join(
        &self,
        rank: usize,
        ranks: usize,
        failed: Arc<AtomicBool>,
    ) -> Result<Arc<dyn Collective>, Error> {
        let mut comm: Comm = ptr::null_mut();
        let mut config = Config::new();
        // SAFETY: the library writes one handle and reads one structure; all ranks call it with the same name.
        let status = unsafe {
            (self.library.comm_init_rank)(
                &mut comm,
                ranks as c_int,
                self.id,
                rank as c_int,
                &mut config,
            )
        };
        let joined = Rank {
            library: self.library,
            comm: Mutex::new(Handle(comm)),
            failed,
            rank,
            ranks,
        };
        joined.settle("does not start", status, comm)?;
        Ok(Arc::new(joined))
    }
}

/// A communicator; null once it was given back.
struct Handle(Comm);

// SAFETY: NCCL lets any thread use a communicator, one at a time, which the mutex around it sees to.
unsafe impl Send for Handle {}

struct Rank {
    library: &'static Library,
    comm: Mutex<Handle>,
    /// Whether any of the ranks has failed.
    failed: Arc<AtomicBool>,
    rank: usize,
    ranks: usize,
}

impl Rank {
    fn comm(&self) -> MutexGuard<'_, Handle> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what was begun with `status`, but not for a rank that has failed.
    fn settle(&self, what: &str, mut status: c_int, comm: Comm) -> Result<(), Error> {
        while status == IN_PROGRESS {
            if self.failed.load(Ordering::Acquire) {
                return Err(Error::device(OTHER, "its message says why"));
            }
            let mut now = SUCCESS;
            // SAFETY: the communicator lives; the library writes one number.
            status = match unsafe { (self.library.comm_get_async_error)(comm, &mut now) } {
                SUCCESS => now,
                failed => failed,
            };
            if status == IN_PROGRESS {
                thread::sleep(Duration::from_micros(20));
            }
        }
        self.library.check(what, status)
    }
}

impl Collective for Rank {
    fn ranks(&self) -> usize {
        self.ranks
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn exchange(
        &self,
        leaves: &[(usize, Address, usize)],
        arrives: &[(usize, Address, usize)],
        stream: CUstream,
    ) -> Result<(), Error> {
        let guard = self.comm();
        let Handle(comm) = *guard;
        if comm.is_null() || self.failed.load(Ordering::Acquire) {
            return Err(Error::device(OTHER, "its message says why"));
        }
        let library = self.library;
        // SAFETY: callers name memory of this rank's card of at least this length, which lives until the stream is done;
        // every rank asks for the same exchange.
        let status = unsafe {
            let mut status = (library.group_start)();
            let mut and = |next: c_int| {
                if [SUCCESS, IN_PROGRESS].contains(&status) {
                    status = next;
                }
            };
            for (peer, at, bytes) in leaves.iter().filter(|(_, _, bytes)| *bytes > 0) {
                let at = *at as *const c_void;
                and((library.send)(
                    at,
                    *bytes,
                    BYTES,
                    *peer as c_int,
                    comm,
                    stream,
                ));
            }
            for (peer, at, bytes) in arrives.iter().filter(|(_, _, bytes)| *bytes > 0) {
                let at = *at as *mut c_void;
                and((library.recv)(
                    at,
                    *bytes,
                    BYTES,
                    *peer as c_int,
                    comm,
                    stream,
                ));
            }
            and((library.group_end)());
            status
        };
        self.settle("exchanges nothing", status, comm)
    }

    fn fault(&self) -> Option<String> {
        let guard = self.comm();
        let Handle(comm) = *guard;
        if comm.is_null() || self.failed.load(Ordering::Acquire) {
            return Some(OTHER.into());
        }
        let mut error = SUCCESS;
        // SAFETY: the communicator lives; the library writes one number.
        let status = unsafe { (self.library.comm_get_async_error)(comm, &mut error) };
        let fault = [status, error]
            .into_iter()
            .find(|e| ![SUCCESS, IN_PROGRESS].contains(e));
        fault.map(|e| self.library.text(e))
    }

    fn leave(&self) {
        let mut guard = self.comm();
        let Handle(comm) = std::mem::replace(&mut *guard, Handle(ptr::null_mut()));
        if !comm.is_null() {
            // SAFETY: the handle is given back once. (ncclCommDestroy would wait for what hangs.)
            unsafe { (self.library.comm_abort)(comm) };
        }
    }
}

/// What ranks say of which another has failed.
const OTHER: &str = "another card has failed";

impl Drop for Rank {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        assert_eq!(check(Some(((), 22_809))), Ok(()));
        let hint = "hint: `pip install nvidia-nccl-cu13` brings it; in an active virtual environment it is found, else put \
                    its folder into LD_LIBRARY_PATH; one card needs none";
        assert_eq!(
            check::<()>(None).unwrap_err().to_string(),
            format!("NCCL, which joins several cards, cannot be loaded (libnccl.so.2)\n{hint}")
        );
        assert_eq!(
            check(Some(((), 22_605))).unwrap_err().to_string(),
            format!("NCCL 2.27 or newer is needed\n{hint}")
        );
    }

    /// The library makes groups without a card, and each is another.
    #[test]
    fn groups_have_names() {
        if crate::cuda::tests::libraries().nccl.is_none() {
            return crate::cuda::tests::skip(
                "NCCL is missing (pip install nvidia-nccl-cu13, RUNNER_PYTHON)",
            );
        }
        let (a, b) = (Group::new().unwrap(), Group::new().unwrap());
        assert!(a.id.0 != b.id.0);
        assert!(a.id.0.iter().any(|byte| *byte != 0));
    }
}
