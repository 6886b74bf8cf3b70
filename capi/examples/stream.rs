// Runs a model that PyTorch saved step by step, in Rust with std alone: the functions of tritlstm.h declared by hand.
//
//     stream MODEL.safetensors PREFIX STEPS
//
// The input of step t is sin(t + d) for its elements d. Prints the output of every step, a line each, then what ran.
//
//     rustc -O stream.rs -L DIR/lib -l tritlstm -C link-arg=-Wl,-rpath,DIR/lib
//
// SPDX-License-Identifier: MIT
use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::{env, process, ptr};

#[repr(C)]
struct Options {
    size: usize,
    input_size: i64,
    hidden_size: i64,
    num_layers: i64,
    proj_size: i64,
    bias: i32,
    bidirectional: i32,
    batch_first: i32,
    dtype: i32,
    device: i32,
    device_index: i32,
    initial_weights: i32,
    reserved: i32,
    seed: u64,
    more: *const c_char,
}

#[repr(C)]
struct LoadOptions {
    size: usize,
    prefix: *const c_char,
    dtype: i32,
    device: i32,
    device_index: i32,
    batch_first: i32,
    more: *const c_char,
}

const FLOAT32: i32 = 1;

extern "C" {
    fn tritlstm_last_error() -> *const c_char;
    fn tritlstm_options_init(options: *mut Options, size: usize) -> c_int;
    fn tritlstm_load_options_init(options: *mut LoadOptions, size: usize) -> c_int;
    fn tritlstm_create_from_safetensors(path: *const c_char, options: *const LoadOptions, lstm: *mut *mut c_void) -> c_int;
    fn tritlstm_destroy(lstm: *mut c_void);
    fn tritlstm_get_options(lstm: *const c_void, options: *mut Options) -> c_int;
    fn tritlstm_sizes(lstm: *const c_void, steps: i64, batch: i64, training: i32, workspace: *mut usize,
                      reserve: *mut usize) -> c_int;
    fn tritlstm_state_create(lstm: *const c_void, batch: i64, state: *mut *mut c_void) -> c_int;
    fn tritlstm_state_destroy(state: *mut c_void);
    fn tritlstm_step(state: *mut c_void, x: *const c_void, out: *mut c_void, workspace: *mut c_void,
                     workspace_bytes: usize, stream: *mut c_void) -> c_int;
    fn tritlstm_explain(lstm: *const c_void, steps: i64, batch: i64, training: i32, text: *mut c_char,
                        capacity: usize, needed: *mut usize) -> c_int;
}

fn check(status: c_int) -> Result<(), String> {
    if status == 0 {
        return Ok(());
    }
    // Safe: never NULL, and this thread makes no other call before the copy.
    Err(unsafe { CStr::from_ptr(tritlstm_last_error()) }.to_string_lossy().into_owned())
}

/// A network, destroyed with its owner.
struct Lstm(*mut c_void);

impl Lstm {
    fn load(path: &str, prefix: &str) -> Result<Lstm, String> {
        let path = CString::new(path).map_err(|e| e.to_string())?;
        let prefix = CString::new(prefix).map_err(|e| e.to_string())?;
        let mut handle = ptr::null_mut();
        unsafe {
            let mut options: LoadOptions = std::mem::zeroed();
            check(tritlstm_load_options_init(&mut options, std::mem::size_of::<LoadOptions>()))?;
            options.prefix = prefix.as_ptr();
            options.dtype = FLOAT32;
            check(tritlstm_create_from_safetensors(path.as_ptr(), &options, &mut handle))?;
        }
        Ok(Lstm(handle))
    }

    fn options(&self) -> Result<Options, String> {
        unsafe {
            let mut options: Options = std::mem::zeroed();
            check(tritlstm_options_init(&mut options, std::mem::size_of::<Options>()))?;
            check(tritlstm_get_options(self.0, &mut options))?;
            Ok(options)
        }
    }

    fn explain(&self) -> Result<String, String> {
        let mut needed = 0;
        unsafe {
            check(tritlstm_explain(self.0, 1, 1, 0, ptr::null_mut(), 0, &mut needed))?;
            let mut text = vec![0u8; needed];
            check(tritlstm_explain(self.0, 1, 1, 0, text.as_mut_ptr().cast(), needed, ptr::null_mut()))?;
            text.pop();
            String::from_utf8(text).map_err(|e| e.to_string())
        }
    }
}

impl Drop for Lstm {
    fn drop(&mut self) {
        unsafe { tritlstm_destroy(self.0) }
    }
}

/// One sequence between two steps. The workspace is in 16-byte units, so that it is aligned.
struct Stream {
    state: *mut c_void,
    workspace: Vec<u128>,
    bytes: usize,
    width: usize,
}

impl Stream {
    fn new(lstm: &Lstm, width: usize) -> Result<Stream, String> {
        let (mut state, mut bytes) = (ptr::null_mut(), 0);
        unsafe {
            check(tritlstm_sizes(lstm.0, 1, 1, 0, &mut bytes, ptr::null_mut()))?;
            check(tritlstm_state_create(lstm.0, 1, &mut state))?;
        }
        // u128 is aligned to 16 bytes by Rust 1.77 and later, to 8 before: one unit more to start at a multiple of 16.
        Ok(Stream { state, workspace: vec![0; bytes / 16 + 2], bytes, width })
    }

    fn step(&mut self, x: &[f32]) -> Result<Vec<f32>, String> {
        let mut out = vec![0f32; self.width];
        let address = self.workspace.as_mut_ptr() as usize;
        let workspace = if self.bytes == 0 { 0 } else { (address + 15) / 16 * 16 } as *mut c_void;
        let (x, to) = (x.as_ptr().cast(), out.as_mut_ptr().cast());
        unsafe { check(tritlstm_step(self.state, x, to, workspace, self.bytes, ptr::null_mut()))? };
        Ok(out)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        unsafe { tritlstm_state_destroy(self.state) }
    }
}

fn run(path: &str, prefix: &str, steps: usize) -> Result<(), String> {
    let lstm = Lstm::load(path, prefix)?;
    let shape = lstm.options()?;
    let width = if shape.proj_size == 0 { shape.hidden_size } else { shape.proj_size };
    let mut stream = Stream::new(&lstm, width as usize)?;
    for t in 0..steps {
        let x: Vec<f32> = (0..shape.input_size).map(|d| ((t as i64 + d) as f32).sin()).collect();
        let out: Vec<String> = stream.step(&x)?.iter().map(|value| format!("{value:.9e}")).collect();
        println!("{}", out.join(" "));
    }
    println!("{}", lstm.explain()?);
    Ok(())
}

fn main() {
    let words: Vec<String> = env::args().skip(1).collect();
    let steps = words.get(2).and_then(|word| word.parse().ok());
    let result = match (words.len(), steps) {
        (3, Some(steps)) => run(&words[0], &words[1], steps),
        _ => Err("usage: stream MODEL.safetensors PREFIX STEPS".to_string()),
    };
    if let Err(message) = result {
        eprintln!("stream: {message}");
        process::exit(1);
    }
}
