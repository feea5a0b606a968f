use engine::cpu::*; use engine::*;
fn main(){ let a:Vec<String>=std::env::args().collect(); let d:usize=a[1].parse().unwrap(); let res:usize=a[2].parse().unwrap(); let b:usize=a[3].parse().unwrap(); let t:usize=a[4].parse().unwrap(); let mode=&a[5]; let n:usize=a[6].parse().unwrap();
 let g=nn::resnet(d,res,1000,nn::Recipe::Torchvision).unwrap();
 let mut o=Options::new(b,t); if a.len()>7 && a[7]=="bf16"{o.precision=Precision::Bf16}; if a.len()>8 {o.winograd=a[8]=="w"}
 let s=initial_state(&g,0); let mut c=Cpu::new(&g,&o,&s).unwrap();
 let px:Vec<u8>=(0..b*res*res*3).map(|i|((i*7919)>>3)as u8).collect(); let l:Vec<u32>=(0..b).map(|i|(i*37%1000)as u32).collect();
 let batch=Batch{pixels:Pixels::U8(&px),labels:&l};
 let h=Hyper{lr:0.1,momentum:0.9,nesterov:false,weight_decay:1e-4,decay:Decay::All,label_smoothing:0.0};
 let mut v=vec![]; for i in 0..n+1 { if i==1{c.start_profile()} let t0=std::time::Instant::now(); let m= if mode=="train"{c.train_step(&batch,&h).unwrap()}else{c.eval_step(&batch).unwrap()}; let e=t0.elapsed().as_secs_f64(); if i>0{v.push(e)}; eprintln!("{e:.3}s loss {:.4}",m.loss()); }
 let p=c.take_profile(); let tot:f64=v.iter().sum(); 
 for k in &p { let s=k.time.as_secs_f64(); println!("{:6.2}% {:8.2} ms {:3}x {:7.1} GF/s {:6.1} GB/s {}",100.*s/tot,1e3*s/n as f64,k.calls/n,2e-9*k.macs as f64/s,1e-9*k.bytes as f64/s,k.name); }
 let acc:f64=p.iter().map(|k|k.time.as_secs_f64()).sum(); v.sort_by(|a,b|a.partial_cmp(b).unwrap());
 println!("accounted {:.1}% best {:.2} median {:.2} img/s  {}",100.*acc/tot,b as f64/v[0],b as f64/v[v.len()/2], c.describe());
 println!("{}",std::fs::read_to_string("/proc/self/status").unwrap().lines().find(|l|l.starts_with("VmHWM")).unwrap()); }
